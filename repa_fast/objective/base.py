"""What an objective and an alignment are to a training step, a sampler and an evaluation.

A new one is a subclass in a file of this folder: `--objective` and `--align` find it by its name.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from torch.nn import Module

from repa_fast.configs.align import AlignConfig
from repa_fast.configs.objective import ObjectiveConfig
from repa_fast.configs.sampler import SamplerConfig
from repa_fast.data.features import FeatureColumn
from repa_fast.diffusion.draws import Draws
from repa_fast.diffusion.path import Path
from repa_fast.distributed import World
from repa_fast.models.sit import SiT

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


class Objective:
    """What a model learns to predict of noisy latents, and how it is sampled."""

    name: ClassVar[str]  # the value of `--objective`
    model: ClassVar[type[SiT]] = SiT
    paper: ClassVar[str] = ""  # name and arXiv number, for a model card
    others: ClassVar[tuple[str, ...]] = ()  # losses beside that of denoising, each of weight 1
    unused: ClassVar[tuple[str, ...]] = ()  # settings of SamplerConfig that mean nothing to it
    integer_times: ClassVar[bool] = False  # of the model: 0..999 instead of [0, 1]
    path: Path  # from clean latents to noise, as it is trained

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

        ValueError for settings that mean nothing to it, or that do not go together.
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
        self, output: Tensor, clean: Tensor, noise: Tensor, velocity: Tensor, t: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the loss of denoising and those of `others`, (B) each, in fp32.

        The output is the model's; clean, noise and velocity are (B, C, h, w), and t (B) as the
        model takes it.
        """
        raise NotImplementedError

    def earlier(self, t: Tensor, u: Tensor, t_max: float) -> Tensor:
        """Return times (B) with less noise than `t` (B, in [0, 1]), as the model takes them.

        `u` (B), uniform in [0, 1], says how much earlier, up to `t_max`.
        """
        raise NotImplementedError

    def sample(
        self,
        model: Module,
        noise: Tensor,
        labels: Tensor,
        settings: SamplerConfig,
        *,
        seed: int,
        index: Tensor | None = None,
    ) -> Tensor:
        """Return clean latents (B, C, h, w), in the dtype of the sampler's state.

        They are of noise (B, C, h, w) and labels (B), int64. What the sampler draws depends on
        `seed` and on `index` (B), the images' numbers; their positions where None.
        """
        raise NotImplementedError

    def scheduler(self) -> "SchedulerMixin | None":
        """Return a scheduler of diffusers that steps as `sample` in one of its modes, in fp32.

        None where diffusers has none; its pipeline then calls `sample`.
        """
        return None


class Alignment:
    """What hidden states are aligned with in training."""

    name: ClassVar[str]  # the value of `--align`
    paper: ClassVar[str] = ""  # as of an objective
    losses_known: ClassVar[tuple[str, ...]]  # values of `--loss-type`
    decays_known: ClassVar[tuple[str, ...]] = ("constant", "linear")  # of `--align-decay`
    encoders_default: ClassVar[str] = "none"  # `--enc-type` where none is given
    title: ClassVar[str] = "nothing frozen"  # what it is compared with, for people
    heads: Sequence[str] = ()  # a name for each head that is aligned; none aligns nothing
    teacher_depth: int = 0  # blocks of the EMA that run in every step

    def __init__(self, config: AlignConfig) -> None:
        self.config = config
        self.encoders: dict[str, Module] = {}  # frozen, in the order of the heads, once loaded
        self.features: list[FeatureColumn] = []  # columns that stand for them, in that order

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
        batch: Mapping[str, Tensor],
        clean: Tensor,
        draws: Draws,
        objective: Objective,
        teacher: SiT,
    ) -> list[Tensor]:
        """Return what each head's output is compared with, (B, N, width), without gradients.

        The batch is the loader's, on the device; clean (B, C, h, w) are its latents and `draws` its
        own; the teacher is the model's EMA.
        """
        return []

    def losses(
        self, projections: Sequence[Tensor], targets: Sequence[Tensor], world: World
    ) -> list[Tensor]:
        """Return the loss (B), fp32, of each head's output (B, N, Z) against its target.

        ValueError where numbers or shapes of outputs and targets differ.
        """
        raise NotImplementedError

    def weight(self, step: int) -> float:
        """Return the weight of the alignment in the step after `step` steps."""
        if self.config.align_decay == "linear":
            return self.config.proj_coeff * max(0.0, 1 - step / self.config.align_until)
        return self.config.proj_coeff
