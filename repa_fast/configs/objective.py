"""What the model predicts, and of which noise."""

from dataclasses import dataclass
from typing import Literal

from repa_fast.configs.model import ModelConfig
from repa_fast.contracts import expect_choice
from repa_fast.diffusion.draws import WEIGHTINGS
from repa_fast.diffusion.path import PATHS


@dataclass(kw_only=True)
class ObjectiveConfig(ModelConfig):
    """What the model predicts, and of which noise; repa_fast/objective checks what fits."""

    objective: str = "flow"
    """SiT's velocity of an interpolant, or DiT's noise and variance of a chain of 1000 steps."""
    path_type: str = "linear"
    """Interpolant: linear, cosine (GVP) or VP."""
    prediction: Literal["v", "score", "noise"] = "v"
    """What a flow model predicts: the velocity, the score or the noise."""
    loss_weight: Literal["none", "velocity", "likelihood"] = "none"
    """Weight of the loss of scores and noise, as SiT's."""
    weighting: str = "uniform"
    """Distribution of times: uniform or lognormal."""
    cfg_prob: float = 0.1
    """Probability of replacing a label by the null label."""
    legacy: bool = False
    """Drop labels twice over, as upstream does under this flag: 1 - (1 - CFG_PROB)^2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_choice("path_type", self.path_type, tuple(PATHS))
        expect_choice("weighting", self.weighting, WEIGHTINGS)
        if not 0 <= self.cfg_prob <= 1:
            raise ValueError(f"cfg_prob is {self.cfg_prob}, expected a probability in [0, 1]")

    @property
    def drop_prob(self) -> float:
        """Probability that a label is dropped."""
        return 1 - (1 - self.cfg_prob) ** 2 if self.legacy else self.cfg_prob
