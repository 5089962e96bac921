"""What a training run consists of, and how it is built from a config."""

import copy
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from repa_fast.configs.build import build_model
from repa_fast.configs.config import TrainConfig
from repa_fast.data.dataset import Metadata
from repa_fast.data.features import FeatureColumn
from repa_fast.data.latents import VAE, can_decode
from repa_fast.distributed import World
from repa_fast.models.sit import SiT
from repa_fast.objective import Alignment, Objective, build_alignment, build_objective
from repa_fast.train.compute_copy import JointAdaLN, add_copies
from repa_fast.train.kernels import choose_kernels
from repa_fast.train.metrics import Accumulator
from repa_fast.train.optim import AdamWEMA, build_optimizer
from repa_fast.train.parallel import device_mesh, parallelize, shard_encoder, whole_model, wrap
from repa_fast.train.spikes import History

AUTOCAST = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class TrainState:
    """Everything a step reads and writes.

    Attributes:
        objective: what the model learns; alignment: what its hidden states are aligned with.
        mesh: what model, EMAs and optimizer state are sharded on; None where they are whole.
        model: fp32 master weights; `wrapped` is the same model, under DDP with several processes
            that do not shard it.
        ema: moving average of the weights, in eval mode; more_emas: those of other decays.
        scaler: active for fp16 only.
        vae: for sample grids, not loaded yet; None where the latents are pixels.
        notes: lines about how the run computes, for the log.
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
    wrapped: nn.Module
    ema: SiT
    more_emas: list[SiT]
    optimizer: AdamWEMA
    scaler: torch.amp.GradScaler
    metrics: Accumulator
    autocast_dtype: torch.dtype | None
    vae: VAE | None
    notes: list[str]
    micro_batch: int
    step: int = field(default=0)
    history: History = field(default_factory=History)

    def autocast(self) -> torch.autocast:
        """Return the context of forward passes, in their precision."""
        return torch.autocast(
            self.world.device.type,
            dtype=self.autocast_dtype,
            enabled=self.autocast_dtype is not None,
        )

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
        """Load what the config aligns with, unless batches carry its features."""
        self.alignment.load(self.world)
        for encoder in self.alignment.encoders.values():
            if self.config.shard_encoder and self.mesh is not None:
                shard_encoder(encoder, self.mesh, compiled=self.config.compile)
                continue
            if self.autocast_dtype is not None:
                cast_linear(encoder, self.autocast_dtype)
            if self.config.compile:
                encoder.compile()

    def end_alignment(self) -> None:
        """Drop the encoders; heads get no gradients from here on, and DDP expects none."""
        self.alignment.end()
        for heads in (self.model.projectors, self.model.ap_head):
            if heads is not None:
                heads.requires_grad_(False)
        self.wrapped = wrap(self.model, self.config, self.world)

    def whole_average(self, *, everywhere: bool) -> SiT | None:
        """Return the EMA with whole weights; as `parallel.whole_model` says where it is sharded."""
        return whole_model(self.ema, self.config, self.metadata, self.world, everywhere=everywhere)

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

    Raises:
        ValueError: the batch does not divide among the processes, or as for `model_arguments`,
            `shard_count` and the alignment's `choose_features`.
    """
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
    copies = reduce_precision(model, config)
    parallelize(model, emas, config, mesh, dtype, alignment.teacher_depth)
    optimizer = build_optimizer(model, emas, config, copies)
    notes.append(f"optimizer: {optimizer.implementation}, {optimizer.reason}")
    state = TrainState(
        config=config,
        world=world,
        metadata=metadata,
        objective=objective,
        alignment=alignment,
        mesh=mesh,
        model=model,
        wrapped=wrap(model, config, world),
        ema=emas[0],
        more_emas=emas[1:],
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16),
        metrics=Accumulator(others, world.device),
        autocast_dtype=dtype,
        vae=None if can_decode(metadata) else VAE(config.vae_path or metadata.vae),
        micro_batch=0,
        notes=notes,
    )
    if not encoders_later:
        state.load_encoders()
    return state


def reduce_precision(model: SiT, config: TrainConfig) -> dict[nn.Parameter, torch.Tensor]:
    """Let the model compute with what the config asks for, beside autocast; {weight: copy}."""
    if config.residual_dtype == "bf16":
        model.residual_dtype = torch.bfloat16
    if config.compute_copy == "autocast":
        return {}
    copies = add_copies(model)
    if config.joint_adaln:
        model.joint_adaln = JointAdaLN(model, copies)
    return copies


def autocast_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """Return the dtype of forward passes; None is fp32.

    Raises:
        ValueError: copies or residual stream shall be bf16, and that is not what is computed in.
    """
    precision = config.mixed_precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "no"
    for name, value in (("compute_copy", "optimizer"), ("residual_dtype", "bf16")):
        if getattr(config, name) == value and precision != "bf16":
            raise ValueError(f"{name} is {value!r}, which needs --mixed-precision bf16")
    return AUTOCAST[precision]


def cast_linear(encoder: nn.Module, dtype: torch.dtype) -> None:
    """Cast the linear layers of a frozen encoder once, as autocast would at every call.

    Its tokens under autocast stay the same, bit for bit; without autocast it cannot be called.
    """
    for module in encoder.modules():
        if type(module) is nn.Linear:
            module.to(dtype)


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
