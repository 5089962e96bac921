"""The rival of the training step: REPA's recipe in plain PyTorch, on a transformer of its own.

`Baseline` is what a user of the released trainer gets, from its measured properties and in code of
our own: fp16 autocast with a loss scaler, no compilation, a cosine loss sample by sample, foreach
AdamW, an EMA parameter by parameter, three numbers read by the host in every step.
`tuned=True` is the same step as someone who knows PyTorch writes it: bf16, one expression for the
loss, fused AdamW, a foreach EMA, nothing read by the host.

The model has the parameter names and shapes of repa_fast.models.sit.SiT, with LayerNorm,
modulation, gates and additions as separate operations. Shapes: B batch, N tokens, D width.
"""

import copy
import importlib.util
import math
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import record_function

from repa_fast.configs.build import model_arguments
from repa_fast.data.loader import Batch
from repa_fast.diffusion.draws import Draws
from repa_fast.train.state import TrainState

FREQUENCIES = 256
PLAIN = {
    **{"objective": "flow", "prediction": "v", "path_type": "linear", "weighting": "uniform"},
    **{"align": "repa", "loss_type": "cos", "projector": "mlp", "align_decay": "constant"},
    **{"features": "", "spatial_norm": False, "qk_norm": False, "align_until": 0},
}
"""What the recipe does, by field of TrainConfig."""


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return x (B, N, D) times 1 + scale (B, D), plus shift (B, D)."""
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


class Block(nn.Module):
    """adaLN-zero as in DiT's paper (arXiv 2212.09748), operation by operation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        layers = {"fc1": nn.Linear(width, 4 * width), "act": nn.GELU("tanh")}
        self.mlp = nn.Sequential(OrderedDict(layers, fc2=nn.Linear(4 * width, width)))
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
        """Return velocity (B, C, h, w) and hidden states (B, N, features) for each encoder."""
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
    """Return the mean negative cosine of patches, looping over encoders and samples; 0-d."""
    total, count = 0.0, 0
    for projection, target in zip(projections, targets):
        for projected, wanted in zip(projection, target):
            projected, wanted = F.normalize(projected, dim=-1), F.normalize(wanted, dim=-1)
            total = total + (-(projected * wanted).sum(dim=-1)).mean()
            count += 1
    return total / count


def at_once(projections: list, targets: list) -> torch.Tensor:
    """Return the same from whole batches; 0-d."""
    pairs = zip(projections, targets)
    return -torch.stack([F.cosine_similarity(*pair, -1, 1e-12).mean() for pair in pairs]).mean()


class Baseline:
    """A training step that begins with the weights of `state`, in its precision.

    `tuned` as someone who knows PyTorch writes it; `compiled` block by block, encoders as they are
    in `state`. Raises ValueError for a setting that is not in the recipe.
    """

    def __init__(self, state: TrainState, *, tuned: bool, compiled: bool) -> None:
        config = state.config
        for name, value in PLAIN.items():
            if getattr(config, name) != value:
                raise ValueError(
                    f"{name} is {getattr(config, name)!r}, expected {value!r}: the plain recipe "
                    "does nothing else"
                )
        if not tuned:  # torch's default, which the release leaves as it is
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
        self.config, self.metadata, self.world = config, state.metadata, state.world
        self.encoders, self.tuned = state.alignment.encoders, tuned
        self.micro_batch = state.local_batch
        self.precision = self.encoder_precision = state.autocast_dtype
        with state.world.device:  # where drawing the initial weights takes no time
            self.model = self.new_model(model_arguments(config, state.metadata))
        self.model.load_state_dict(state.model.state_dict())
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        if compiled:
            for block in self.model.blocks:
                block.compile(fullgraph=True)
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
        self.loss = torch.zeros(())  # of the last step; 0-d on the device

    def new_model(self, arguments: dict) -> nn.Module:
        """Return the model, from the arguments of repa_fast.models.sit.SiT."""
        return PlainSiT(arguments)

    def draw(self, size: int) -> Draws:
        """Draw the randomness of a step on the device; the recipe's times on the host."""
        device = self.world.device
        t = torch.rand(size, device=device if self.tuned else None).to(device)
        noise, posterior_noise = (
            torch.randn(size, *self.metadata.latent_shape, device=device) for _ in range(2)
        )
        drop = torch.rand(size, device=device) < self.config.cfg_prob
        return Draws(t, noise, posterior_noise, drop, offset=t)

    def autocast(self, precision: torch.dtype | None) -> torch.autocast:
        """Compute in this precision; None is fp32."""
        return torch.autocast(self.world.device.type, precision, enabled=precision is not None)

    def clean(self, batch: Batch, noise: torch.Tensor) -> torch.Tensor:
        """Draw latents (B, C, h, w) from the posterior that the batch describes."""
        mean, std = batch["moments"].chunk(2, dim=1)
        return (mean + std * noise) * self.metadata.scale + self.metadata.bias

    @torch.no_grad()
    def targets(self, batch: Batch) -> list[torch.Tensor]:
        """Return patch tokens (B, N, features) of each encoder."""
        with self.autocast(self.encoder_precision), record_function("encoder"):
            return [encoder(batch["image"]) for encoder in self.encoders.values()]

    def losses(self, batch: Batch, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean losses of velocity and alignment, 0-d."""
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
        """Return the same of a step's own draws."""
        return self.losses(batch, self.draw(len(batch["label"])))

    def step(self, batch: Batch) -> None:
        """Take one optimizer step."""
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
            decay = self.config.ema_decays[0]
            averages = list(self.ema.parameters())
            weights = [parameter.detach() for parameter in self.model.parameters()]
            if self.tuned:
                torch._foreach_lerp_(averages, weights, 1 - decay)
            else:
                for average, weight in zip(averages, weights):
                    average.mul_(decay).add_(weight, alpha=1 - decay)
        self.loss = loss.detach()
        if not self.tuned:
            for number in (loss, aligned, norm):
                number.item()

    def loss_of(self, batch: Batch, draws: Draws) -> float:
        """Return the loss of these draws, without a step."""
        denoise, aligned = self.losses(batch, draws)
        return (denoise + self.config.proj_coeff * aligned).item()

    def check(self) -> None:
        """Raise RuntimeError unless the last loss is finite."""
        if not torch.isfinite(self.loss):
            raise RuntimeError(f"the last loss is {self.loss.item()}; no figure")

    def name_ranges(self) -> None:
        """Do nothing: the step names its parts for the profiler itself."""


class Official(Baseline):
    """A training step with the model and loss of a folder with REPA's code.

    The folder's own models/sit.py and loss.py, which this project does not contain; the step around
    them, its optimizer and its encoders are `Baseline`'s. Shows whether Baseline is fair to them.
    Raises ValueError if the folder does not hold it.
    """

    def __init__(self, state: TrainState, folder: Path) -> None:
        self.folder = folder
        self.loss_function = load(folder, "loss.py").SILoss()
        super().__init__(state, tuned=False, compiled=False)
        self.model.train()

    def new_model(self, arguments: dict) -> nn.Module:
        """Return its model, from the arguments of repa_fast.models.sit.SiT."""
        names = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads")
        names += ("encoder_depth", "num_classes", "class_dropout_prob", "z_dims", "projector_dim")
        given = {name: arguments[name] for name in names}
        given |= {"decoder_hidden_size": arguments["hidden_size"], "use_cfg": True}
        released = load(self.folder, "models/sit.py").SiT
        return released(**given, fused_attn=True, qk_norm=False)

    def drawn_losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean losses by its own loss function, which draws for itself."""
        targets = self.targets(batch)
        clean = self.clean(batch, torch.randn_like(batch["moments"].chunk(2, dim=1)[0]))
        labels = {"y": batch["label"]}
        denoise, aligned = self.loss_function(self.single, clean, labels, zs=targets)
        return denoise.mean(), aligned.mean()

    def single(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Call its model in the precision of training; return fp32, as accelerate does."""
        with self.autocast(self.precision):
            prediction, projections = self.model(x, t, y)
        return prediction.float(), [projection.float() for projection in projections]

    def loss_of(self, batch: Batch, draws: Draws) -> float:
        """Return the loss of these draws, without a step."""
        plain, null = self.model, self.model.num_classes

        self.model = lambda x, t, y, drop: plain.eval()(x, t, torch.where(drop, null, y))
        try:
            return super().loss_of(batch, draws)
        finally:
            self.model = plain.train()


def load(folder: Path, name: str) -> ModuleType:
    """Import a file of the released code; raise ValueError if it does not exist."""
    file = folder / name
    if not file.is_file():
        raise ValueError(f"{folder} has no {name}, expected a folder with REPA's released code")
    spec = importlib.util.spec_from_file_location(f"released_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
