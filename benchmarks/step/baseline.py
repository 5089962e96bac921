"""The rival of the training step: REPA's recipe in plain PyTorch, on a transformer of its own.

`Baseline` is what a user of the released trainer gets, from its measured properties and in code of
our own: fp16 autocast with a loss scaler, no compilation, a cosine loss sample by sample, foreach
AdamW, a moving average parameter by parameter, three numbers read by the host in every step.
`tuned=True` is the same step as someone who knows PyTorch writes it: bf16, one expression for the
loss, fused AdamW, a foreach average, nothing read by the host.

The model has the parameter names and shapes of repa_fast.models.sit.SiT, with LayerNorm,
modulation, gates and additions as separate operations. Shapes: B batch, N tokens, D width.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import record_function

from repa_fast.configs.config import TrainConfig
from repa_fast.configs.model import model_arguments
from repa_fast.data.loader import Batch
from repa_fast.diffusion.draws import Draws
from repa_fast.train.state import TrainState

FREQUENCIES = 256
PLAIN = {
    "objective": "flow",
    "prediction": "v",
    "path_type": "linear",
    "weighting": "uniform",
    "align": "repa",
    "loss_type": "cos",
    "projector": "mlp",
    "features": "",
    "spatial_norm": False,
    "qk_norm": False,
    "align_decay": "constant",
    "align_until": 0,
}
"""What the recipe does, by field of TrainConfig."""


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (B, N, D) times 1 + scale (B, D), plus shift (B, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Embedder(nn.Module):
    """Times in [0, 1] (B) -> (B, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        half = FREQUENCIES // 2
        steps = torch.arange(half, dtype=t.dtype, device=t.device)
        angles = t[:, None] * torch.exp(-math.log(10000.0) * steps / half)
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))


class SelfAttention(nn.Module):
    """torch's scaled_dot_product_attention, whichever backend torch takes."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, width))


class FeedForward(nn.Module):
    """Two linear layers and a tanh GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """adaLN-zero as in DiT's paper (arXiv 2212.09748), operation by operation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = FeedForward(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class Final(nn.Module):
    """adaLN and a linear layer to the P * P * C values of each patch."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PlainSiT(nn.Module):
    """The model, from the arguments of repa_fast.models.sit.SiT."""

    def __init__(self, arguments: dict) -> None:
        super().__init__()
        width, self.patch = arguments["hidden_size"], arguments["patch_size"]
        self.channels, self.depth = arguments["in_channels"], arguments["encoder_depth"]
        self.null = arguments["num_classes"]
        self.grid = arguments["input_size"] // self.patch
        hidden = arguments["projector_dim"]
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2, width), requires_grad=False)
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(self.channels, width, self.patch, stride=self.patch)
        self.t_embedder = Embedder(width)
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(self.null + 1, width)
        heads = arguments["num_heads"]
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(arguments["depth"]))
        self.projectors = nn.ModuleList(
            nn.Sequential(
                *(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden)),
                *(nn.SiLU(), nn.Linear(hidden, features)),
            )
            for features in arguments["z_dims"]
        )
        self.final_layer = Final(width, self.patch**2 * self.channels)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, drop: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Velocity (B, C, h, w) and projected hidden states, (B, N, features) of each encoder."""
        # contiguous, as in repa_fast.models.sit: compiled, all blocks are one graph
        tokens = self.x_embedder.proj(x).flatten(2).transpose(1, 2).contiguous()
        hidden = tokens + self.pos_embed
        y = torch.where(drop, self.null, y)
        c = self.t_embedder(t) + self.y_embedder.embedding_table(y)
        projections = []
        for number, block in enumerate(self.blocks, start=1):
            hidden = block(hidden, c)
            if number == self.depth:
                projections = [project(hidden) for project in self.projectors]
        patches = self.final_layer(hidden, c)
        shape = (len(x), self.grid, self.grid, self.patch, self.patch, self.channels)
        return patches.view(shape).permute(0, 5, 1, 3, 2, 4).reshape(x.shape), projections


def sample_by_sample(projections: list, targets: list) -> torch.Tensor:
    """Mean negative cosine of patches, in a Python loop over encoders and samples; 0-d."""
    total, count = 0.0, 0
    for projection, target in zip(projections, targets):
        for projected, wanted in zip(projection, target):
            projected = F.normalize(projected, dim=-1)
            wanted = F.normalize(wanted, dim=-1)
            total = total + (-(projected * wanted).sum(dim=-1)).mean()
            count += 1
    return total / count


def at_once(projections: list, targets: list) -> torch.Tensor:
    """The same of whole batches; 0-d."""
    cosines = [
        F.cosine_similarity(projection, target, dim=-1, eps=1e-12).mean()
        for projection, target in zip(projections, targets)
    ]
    return -torch.stack(cosines).mean()


class Baseline:
    """A training step that begins with the weights of `state`, in its precision.

    Attributes:
        tuned: whether the step is as someone who knows PyTorch writes it.
        loss: of the last step; 0-d on the device.

    Args:
        compiled: blocks are compiled one by one; encoders as they are in `state`.

    Raises:
        ValueError: a setting that is not in the recipe.
    """

    def __init__(self, state: TrainState, *, tuned: bool, compiled: bool) -> None:
        check(state.config)
        if not tuned:  # torch's default, which the release leaves as it is
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
        self.config, self.metadata, self.world = state.config, state.metadata, state.world
        self.encoders, self.micro_batch, self.tuned = state.encoders, state.local_batch, tuned
        self.precision = self.encoder_precision = state.autocast_dtype
        with state.world.device:  # where drawing the initial weights takes no time
            self.model = self.new_model(model_arguments(state.config, state.metadata))
        self.model.load_state_dict(state.model.state_dict())
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        if compiled:
            for block in self.model.blocks:
                block.compile(fullgraph=True)
        config = state.config
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.adam_weight_decay,
            **({"fused": True} if tuned else {"foreach": True}),
        )
        scales = self.precision == torch.float16
        self.scaler = torch.amp.GradScaler(state.world.device.type, enabled=scales)
        self.loss = torch.zeros(())

    def new_model(self, arguments: dict) -> nn.Module:
        """The model, from the arguments of repa_fast.models.sit.SiT."""
        return PlainSiT(arguments)

    def draw(self, size: int) -> Draws:
        """The randomness of a step on the device; the recipe's times on the host."""
        device = self.world.device
        t = torch.rand(size, device=device if self.tuned else None).to(device)
        noise, posterior_noise = (
            torch.randn(size, *self.metadata.latent_shape, device=device) for _ in range(2)
        )
        drop = torch.rand(size, device=device) < self.config.cfg_prob
        return Draws(t, noise, posterior_noise, drop, offset=t)

    def autocast(self, precision: torch.dtype | None) -> torch.autocast:
        """Computation in this precision; None is fp32."""
        return torch.autocast(self.world.device.type, precision, enabled=precision is not None)

    def clean(self, batch: Batch, noise: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) drawn from the posterior that the batch describes."""
        mean, std = batch["moments"].chunk(2, dim=1)
        return (mean + std * noise) * self.metadata.scale + self.metadata.bias

    @torch.no_grad()
    def targets(self, batch: Batch) -> list[torch.Tensor]:
        """Patch tokens (B, N, features) of each encoder."""
        with self.autocast(self.encoder_precision), record_function("encoder"):
            return [encoder(batch["image"]) for encoder in self.encoders.values()]

    def losses(self, batch: Batch, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean losses of velocity and alignment, 0-d."""
        clean = self.clean(batch, draws.posterior_noise)
        t = draws.t.view(-1, 1, 1, 1)
        noisy, velocity = (1 - t) * clean + t * draws.noise, draws.noise - clean
        targets = self.targets(batch)
        with self.autocast(self.precision):
            prediction, projections = self.model(noisy, draws.t, batch["label"], draws.drop)
        single = torch.promote_types(clean.dtype, torch.float32)
        prediction, projections = prediction.to(single), [p.to(single) for p in projections]
        denoise = (prediction - velocity).square().flatten(1).mean(1).mean()
        if not targets:
            return denoise, denoise.new_zeros(())
        aligned = at_once if self.tuned else sample_by_sample
        return denoise, aligned(projections, targets)

    def drawn_losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of a step's own draws."""
        return self.losses(batch, self.draw(len(batch["label"])))

    def step(self, batch: Batch) -> None:
        """One optimizer step."""
        batch = {n: tensor.to(self.world.device, non_blocking=True) for n, tensor in batch.items()}
        denoise, aligned = self.drawn_losses(batch)
        loss = denoise + self.config.proj_coeff * aligned
        self.scaler.scale(loss).backward()
        with record_function("optimizer"):
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.average()
        self.loss = loss.detach()
        if not self.tuned:
            for number in (loss, aligned, norm):
                number.item()

    @torch.no_grad()
    def average(self) -> None:
        """Move the average of the weights."""
        decay = self.config.ema_decays[0]
        if self.tuned:
            torch._foreach_lerp_(
                list(self.ema.parameters()), list(self.model.parameters()), 1 - decay
            )
            return
        for average, parameter in zip(self.ema.parameters(), self.model.parameters()):
            average.mul_(decay).add_(parameter, alpha=1 - decay)

    def loss_of(self, batch: Batch, draws: Draws) -> float:
        """The loss of these draws, without a step."""
        denoise, aligned = self.losses(batch, draws)
        return (denoise + self.config.proj_coeff * aligned).item()

    def check(self) -> None:
        """RuntimeError unless the last loss is finite."""
        if not torch.isfinite(self.loss):
            raise RuntimeError(f"the last loss is {self.loss.item()}; no figure")

    def name_ranges(self) -> None:
        """Nothing to do: the step names its parts for the profiler itself."""


def check(config: TrainConfig) -> None:
    """ValueError where the recipe does not do what the config asks for."""
    for name, value in PLAIN.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} is {getattr(config, name)!r}, expected {value!r}: the plain recipe does "
                "nothing else"
            )
