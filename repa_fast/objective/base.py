"""What an objective and an alignment are to a training step, a sampler and an evaluation.

A new one is a subclass in a file of this folder: `--objective` and `--align` find it by its name.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from repa_fast.configs.align import AlignConfig
from repa_fast.configs.objective import ObjectiveConfig
from repa_fast.configs.sampler import SamplerConfig
from repa_fast.data.features import FeatureColumn
from repa_fast.diffusion.draws import Draws
from repa_fast.diffusion.path import Path
from repa_fast.distributed import World
from repa_fast.models.sit import SiT


class Objective:
    """What a model learns to predict of noisy latents, and how it is sampled.

    Attributes:
        name: its value of `--objective`.
        model: class of the transformer.
        others: names of its losses beside that of denoising, each of weight 1.
        unused: settings of SamplerConfig that mean nothing to it and keep their defaults.
        path: from clean latents to noise, as it is trained.
    """

    name: ClassVar[str]
    model: ClassVar[type[SiT]] = SiT
    others: ClassVar[tuple[str, ...]] = ()
    unused: ClassVar[tuple[str, ...]] = ()
    path: Path

    def __init__(self, config: ObjectiveConfig) -> None:
        self.path_type, self.prediction = config.path_type, config.prediction
        self.loss_weight = config.loss_weight

    @classmethod
    def check(cls, config: ObjectiveConfig) -> None:
        """Raise ValueError where other settings do not go with this objective."""
        if config.prediction == "v" and config.loss_weight != "none":
            raise ValueError(
                f"loss_weight is {config.loss_weight!r}, expected none with --prediction v"
            )

    def under(self, settings: SamplerConfig) -> "Objective":
        """Return the objective with the path and prediction that a sampler's settings name.

        Raises:
            ValueError: settings that mean nothing to it, or that do not go together.
        """
        plain = SamplerConfig()
        for name in self.unused:
            if getattr(settings, name) != getattr(plain, name):
                raise ValueError(
                    f"{name} is {getattr(settings, name)}, expected {getattr(plain, name)!r}: the "
                    f"model is a {self.model.__name__}, which has no flow"
                )
        asked = ObjectiveConfig(
            objective=self.name,
            path_type=settings.path_type or self.path_type,
            prediction=settings.prediction or self.prediction,
        )
        self.check(asked)
        return type(self)(asked)

    def losses(
        self,
        output: torch.Tensor,
        clean: torch.Tensor,
        noise: torch.Tensor,
        velocity: torch.Tensor,
        t: torch.Tensor,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the loss of denoising and those of `others`, (B) each, in fp32.

        Args:
            output: of the model; clean, noise and velocity are (B, C, h, w).
            t: (B), times as the model takes them.
        """
        raise NotImplementedError

    def earlier(self, t: torch.Tensor, u: torch.Tensor, t_max: float) -> torch.Tensor:
        """Return times (B) with less noise than `t` (B, in [0, 1]), as the model takes them.

        Args:
            u: (B), uniform in [0, 1]: how much earlier.
            t_max: at most.
        """
        raise NotImplementedError

    def sample(
        self,
        model: torch.nn.Module,
        noise: torch.Tensor,
        labels: torch.Tensor,
        settings: SamplerConfig,
        *,
        seed: int,
        index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return clean latents (B, C, h, w), in the dtype of the sampler's state.

        Args:
            noise: (B, C, h, w); labels (B), int64.
            seed, index: of what the sampler draws; index (B) are the images' numbers, their
                positions where None.
        """
        raise NotImplementedError


class Alignment:
    """What hidden states are aligned with in training.

    Attributes:
        name: its value of `--align`.
        losses_known: the values of `--loss-type` it takes; decays_known of `--align-decay`.
        encoders_default: `--enc-type` where none is given.
        title: what it is compared with, for people.
        heads: a name for each head of the model that is aligned; none aligns nothing.
        teacher_depth: blocks of the EMA that run in every step; 0 is none.
        encoders: frozen modules by name, in the order of the heads; empty until `load`.
        features: columns of the dataset that stand for encoders, in that order.
    """

    name: ClassVar[str]
    losses_known: ClassVar[tuple[str, ...]]
    decays_known: ClassVar[tuple[str, ...]] = ("constant", "linear")
    encoders_default: ClassVar[str] = "none"
    title: ClassVar[str] = "nothing frozen"
    heads: Sequence[str] = ()
    teacher_depth: int = 0

    def __init__(self, config: AlignConfig) -> None:
        self.config = config
        self.encoders: dict[str, torch.nn.Module] = {}
        self.features: list[FeatureColumn] = []

    @classmethod
    def check(cls, config: AlignConfig) -> None:
        """Raise ValueError where other settings do not go with this alignment."""
        if config.loss_type not in cls.losses_known:
            raise ValueError(
                f"loss_type is {config.loss_type!r}, expected one of "
                f"{', '.join(cls.losses_known)} with align {cls.name}"
            )
        if config.align_decay == "linear" and config.align_until < 1:
            raise ValueError("align_decay is 'linear', which needs --align-until, where it ends")

    def expect_model(self, depth: int, tokens: int) -> None:
        """Raise ValueError unless it fits a model of `depth` blocks and `tokens` tokens."""

    def model_arguments(self) -> dict:
        """Return SiT's arguments for the heads: the block they read, their widths and kind."""
        return {"encoder_depth": self.config.encoder_depth, "z_dims": []}

    def describe(self) -> tuple[str, str]:
        """Return what is aligned with, and at which block, for a table."""
        return (",".join(self.heads), f"{self.config.encoder_depth}") if self.heads else ("-", "-")

    def flops(self, tokens: int, width: int) -> tuple[float, float]:
        """Return FLOPs per image of the forward passes of the heads, and of what is frozen."""
        return 0.0, 0.0

    def choose_features(self, columns: Mapping[str, FeatureColumn]) -> None:
        """Take the columns that the config names from the dataset's."""

    def load(self, world: World) -> None:
        """Load frozen weights onto the process's device, unless batches carry their features."""

    def hollow(self) -> "Alignment":
        """Return one like it that takes no frozen weights and gives targets of the same shapes."""
        return self

    def end(self) -> None:
        """Drop what is frozen: no step needs it any more."""
        self.encoders, self.features = {}, []

    def targets(
        self,
        batch: Mapping[str, torch.Tensor],
        clean: torch.Tensor,
        draws: Draws,
        objective: Objective,
        teacher: SiT,
    ) -> list[torch.Tensor]:
        """Return what each head's output is compared with, (B, N, width), without gradients.

        Args:
            batch: of the loader, on the device.
            clean: (B, C, h, w), the latents of the batch.
            draws: of the batch.
            teacher: the model's EMA.
        """
        return []

    def losses(
        self, projections: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], world: World
    ) -> list[torch.Tensor]:
        """Return the loss (B), fp32, of each head's output (B, N, Z) against its target.

        Raises:
            ValueError: as many outputs as targets were expected, or shapes differ.
        """
        raise NotImplementedError

    def weight(self, step: int) -> float:
        """Return the weight of the alignment in the step after `step` steps."""
        if self.config.align_decay == "linear":
            return self.config.proj_coeff * max(0.0, 1 - step / self.config.align_until)
        return self.config.proj_coeff
