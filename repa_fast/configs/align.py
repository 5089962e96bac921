"""What hidden states are aligned with."""

from dataclasses import dataclass
from typing import Literal

from repa_fast.configs.data import DataConfig
from repa_fast.configs.objective import ObjectiveConfig


@dataclass(kw_only=True)
class AlignConfig(DataConfig, ObjectiveConfig):
    """What hidden states are aligned with; repa_fast/objective checks what fits."""

    align: str = "repa"
    """What hidden states are aligned with: encoders (repa), or the model's own EMA (sra), which
    needs no images."""
    enc_type: str | None = None
    """Frozen encoders to align with, comma separated; none trains without alignment, and is what
    SRA has; dinov2-vit-b for REPA where not given."""
    enc_weights: str = ""
    """A weights file for each of ENC_TYPE, comma separated; its own source where empty."""
    features: str = ""
    """Columns of the dataset with the features of each of ENC_TYPE, comma separated, from which to
    train without images and encoders; `repa-fast prepare features` adds them."""
    encoder_depth: int = 8
    """The block (1-based) whose output is aligned with encoders."""
    proj_coeff: float = 0.5
    """Weight of the alignment loss."""
    loss_type: str = "cos"
    """REPA: cos (over features) or nt-xent. SRA: cos (over tokens, as its code), cos-features, sml1
    (smooth L1, the paper's), l1, l2."""
    align_until: int = 0
    """Steps after which nothing is aligned and encoders are dropped; 0 aligns to the end."""
    align_decay: str = "constant"
    """Weight of the alignment: PROJ_COEFF, PROJ_COEFF falling to 0 at ALIGN_UNTIL, or that of SRA's
    code, which decays with the images."""
    projector: Literal["mlp", "conv"] = "mlp"
    """REPA's three-layer MLP, or iREPA's 3x3 convolution over the patches."""
    projector_dim: int = 2048
    """Hidden width of the projectors."""
    spatial_norm: bool = False
    """Normalise encoders' tokens over the patches of an image first, as iREPA does."""
    nt_xent_temperature: float = 0.1
    """NT-Xent's temperature."""
    nt_xent_negatives: Literal["image", "batch", "global"] = "image"
    """NT-Xent's negatives: patches of the same image, of this process's micro-batch, or of all
    processes'."""
    block_out_s: int = 8
    """SRA: the block (1-based) of the student."""
    block_out_t: int = 20
    """SRA: the block of the teacher, above the student's."""
    t_max: float = 0.2
    """SRA: how far the teacher may be ahead of the student in time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.align_until < 0 or not 0 <= self.t_max <= 1:
            raise ValueError(
                f"align_until is {self.align_until} and t_max {self.t_max}, expected at least 0, "
                "and 0 to 1"
            )

    @property
    def feature_columns(self) -> list[str]:
        """One column of features per encoder; none if the encoders run."""
        return [name.strip() for name in self.features.split(",")] if self.features else []
