"""What a training run consists of, and how it is built from a config."""

import copy
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from repa_fast import ops
from repa_fast.backend import dispatch
from repa_fast.configs.build import build_model, empty_model, fit_to_data
from repa_fast.configs.config import TrainConfig
from repa_fast.data.dataset import Metadata
from repa_fast.data.features import FeatureColumn
from repa_fast.data.latents import VAE, can_decode
from repa_fast.distributed import World
from repa_fast.models.sit import SiT
from repa_fast.objective import Alignment, Objective, build_alignment, build_objective
from repa_fast.train.gradients import Gradients
from repa_fast.train.leaves import add_leaves
from repa_fast.train.metrics import Accumulator
from repa_fast.train.optim import AdamWEMA, build_optimizer
from repa_fast.train.parallel import (
    device_mesh,
    heads_of,
    parallelize,
    shard_encoder,
    sum_gradients,
)
from repa_fast.train.spikes import History


@dataclass
class TrainState:
    """Everything a step reads and writes.

    Attributes:
        objective: what the model learns; alignment: what its hidden states are aligned with.
        mesh: what model, EMAs and optimizer state are sharded on; None where they are whole.
        model: with fp32 weights, or bf16 leaves of them (repa_fast/train/leaves.py).
        gradients: sums of them over micro-batches and processes, unless FSDP does that.
        ema: EMA of the weights, in eval mode; more_emas: those of other decays.
        scaler: active for fp16 only.
        vae: for sample grids, not loaded yet; None where the latents are pixels.
        notes: lines about how the run computes, for the log.
        rows: of the dataset, on which the order of the data depends; 0 where it is not known.
        micro_batch: images per forward pass of this process; 0 until it is chosen.
        step: optimizer steps done.
        history: what the run has been through; counted where metrics are read.
    """

    config: TrainConfig
    world: World
    metadata: Metadata
    objective: Objective
    alignment: Alignment
    mesh: DeviceMesh | None
    model: SiT
    gradients: Gradients
    ema: SiT
    more_emas: list[SiT]
    optimizer: AdamWEMA
    scaler: torch.amp.GradScaler
    metrics: Accumulator
    autocast_dtype: torch.dtype | None
    vae: VAE | None
    notes: list[str]
    rows: int = 0
    micro_batch: int = 0
    step: int = 0
    history: History = field(default_factory=History)

    def __post_init__(self) -> None:
        self.head_weight = torch.empty((), dtype=torch.float32, device=self.world.device)
        self.set_head_weight()

    def set_head_weight(self) -> None:
        """Set `head_weight`, the loss weight of each aligned head, for the next step."""
        weight = self.alignment.weight(self.step) / max(len(self.alignment.heads), 1)
        self.head_weight.fill_(weight)

    def autocast(self) -> torch.autocast:
        """Return the context of forward passes, in their precision."""
        kind, dtype = self.world.device.type, self.autocast_dtype
        return torch.autocast(kind, dtype=dtype, enabled=dtype is not None)

    @property
    def data_step(self) -> int:
        """The step of order and draws whose data is next: `step` and what was skipped."""
        return self.step + self.history.skipped

    @property
    def aligns(self) -> bool:
        """Whether the next step aligns hidden states with anything."""
        until = self.config.align_until
        return bool(self.alignment.heads) and not (until and self.step >= until)

    def load_encoders(self) -> None:
        """Load what the config aligns with, unless batches carry its features.

        Linear layers of encoders that stay whole are cast once, as autocast would at every call:
        tokens under autocast stay the same, bit for bit; without it they cannot be called.
        """
        self.alignment.load(self.world)
        for encoder in self.alignment.encoders.values():
            if self.config.shard_encoder and self.mesh is not None:
                shard_encoder(encoder, self.mesh, compiled=self.config.compile)
                continue
            if self.autocast_dtype is not None:
                for linear in (m for m in encoder.modules() if type(m) is nn.Linear):
                    linear.to(self.autocast_dtype)
            if self.config.compile:
                encoder.compile()

    def end_alignment(self) -> None:
        """Drop the encoders; heads get no gradients from here on."""
        self.alignment.end()
        for head in heads_of(self.model):
            head.requires_grad_(False)
        self.gradients.forget()

    @torch.no_grad()
    def expect_same_weights(self) -> None:
        """Raise ValueError unless all processes with whole weights and EMAs have the same.

        Compared are sums of their bits, each times its place.
        """
        if self.mesh is not None or self.world.size == 1:
            return
        models, total = (self.model, self.ema, *self.more_emas), 0
        weights = (weight for model in models for weight in model.state_dict().values())
        for number, weight in enumerate(weights, start=1):
            bits = weight.flatten().view(torch.int32).long()
            total += number * (bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum()
        sums = self.world.gather(total)
        if (sums != sums[0]).any():
            raise ValueError(
                "processes begin with other weights than the first one: expected the same files "
                "and flags on all"
            )

    @torch.no_grad()
    def whole_average(self, *, everywhere: bool) -> SiT | None:
        """Return the EMA with whole weights in fp32, in eval mode: itself if it is not sharded.

        All processes call it. Tensors are gathered one at a time. Without `everywhere` only the
        first process gets a sharded EMA's copy, the others None.
        """
        if not isinstance(self.ema, FSDPModule):
            return self.ema
        average = None
        if everywhere or self.world.is_main:
            average = empty_model(self.config, self.metadata, self.world.device)
            targets = average.eval().requires_grad_(False).state_dict()
        for name, tensor in self.ema.state_dict().items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if average is not None:
                targets[name].copy_(whole)
        return average

    @property
    def local_batch(self) -> int:
        """Images of this process per optimizer step."""
        return self.config.images_per_step // self.world.size


def build_state(
    config: TrainConfig,
    metadata: Metadata,
    world: World,
    columns: Mapping[str, FeatureColumn] | None = None,
    *,
    encoders_later: bool = False,
) -> TrainState:
    """Build model, EMA, encoders and optimizer on this process's device, at step 0.

    `columns` are the dataset's columns of features. With `encoders_later` the state's
    `load_encoders` is left to the caller, who may have to find out first whether any are needed.

    ValueError if the batch does not divide among the processes, or what is asked for does not fit
    the dataset, the processes or the device.
    """
    config = fit_to_data(config, metadata)
    if config.images_per_step % world.size:
        raise ValueError(
            f"{config.images_per_step} images per step do not divide among {world.size} processes"
        )
    mesh = device_mesh(config, world)
    configure_backends(config)
    dtype = autocast_dtype(config, world.device)
    model = build_model(config, metadata).to(world.device)
    notes = choose_kernels(config, model, dtype or torch.float32, world)
    emas = [copy.deepcopy(model).eval().requires_grad_(False) for _ in config.ema_decays]
    objective, alignment = build_objective(config), build_alignment(config)
    alignment.choose_features(columns or {})
    others = [*objective.others, *(f"align/{name}" for name in alignment.heads)]
    if config.residual_dtype == "bf16":
        model.residual_dtype = torch.bfloat16
    whole = mesh is None and dtype == torch.bfloat16
    leaves = add_leaves(model, joint=world.size == 1) if whole else {}
    parallelize(model, emas, config, mesh, dtype, alignment.teacher_depth)
    optimizer = build_optimizer(model, emas, config, leaves)
    gradients = sum_gradients(model, config, world)
    optimizer.held = gradients.held
    notes.append(f"optimizer: {optimizer.implementation}, {optimizer.reason}")
    state = TrainState(
        config=config,
        world=world,
        metadata=metadata,
        objective=objective,
        alignment=alignment,
        mesh=mesh,
        model=model,
        gradients=gradients,
        ema=emas[0],
        more_emas=emas[1:],
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16),
        metrics=Accumulator(others, world.device),
        autocast_dtype=dtype,
        vae=None if can_decode(metadata) else VAE(config.vae or metadata.vae),
        notes=notes,
    )
    if not encoders_later:
        state.load_encoders()
    return state


def autocast_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """Return the dtype of forward passes; None is fp32.

    ValueError if the residual stream shall be bf16, and that is not what is computed in.
    """
    precision = config.mixed_precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "no"
    if config.residual_dtype == "bf16" and precision != "bf16":
        raise ValueError("residual_dtype is 'bf16', which needs --mixed-precision bf16")
    return {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def choose_kernels(config: TrainConfig, model: SiT, dtype: torch.dtype, world: World) -> list[str]:
    """Set the kernels of this process and its backend of attention; return a line about each.

    Backends are timed at up to 64 images in `dtype`, the compute's. Timings differ, so the first
    process chooses for all.

    Raises:
        ValueError: an implementation or a backend that cannot run here, with the reason.
        RuntimeError: an attention backend that fails its self-test, with the error measured.
    """
    dispatch.use_kernels(None if config.kernels == "auto" else config.kernels)
    lines = [f"kernels: {dispatch.describe(world.device.type)}"]
    if not config.fused_attn:
        return lines
    heads = model.blocks[0].attn.num_heads
    select = partial(
        ops.select_attention,
        config.attention,
        heads=heads,
        tokens=model.num_tokens,
        head_dim=model.pos_embed.shape[-1] // heads,
        batch=min(config.images_per_step // world.size, 64),
        dtype=dtype,
        device=world.device,
    )
    selection = world.on_first(select)
    ops.set_attention_backend(selection.backend)
    return [*lines, f"attention: {selection.backend} ({selection.reason})"]


def configure_backends(config: TrainConfig) -> None:
    """Set the precision of matmuls; docs/numerics.md says why."""
    torch.set_float32_matmul_precision("high" if config.allow_tf32 else "highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cudnn.allow_tf32 = config.allow_tf32


def device_name(device: torch.device) -> str:
    """Return the name of the device for logs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
