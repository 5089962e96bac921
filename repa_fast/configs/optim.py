"""AdamW, its learning rate, the EMA, and how long training lasts."""

from dataclasses import dataclass
from typing import Literal

from repa_fast.configs.part import Part, expect_at_least


@dataclass(kw_only=True)
class OptimConfig(Part):
    """AdamW, its learning rate, the EMA, and how long training lasts."""

    epochs: int = 1400
    """Stop after so many passes over the data."""
    max_train_steps: int = 400_000
    """Stop after so many steps."""
    learning_rate: float = 1e-4
    """Constant learning rate of AdamW."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up; cosine ends at MIN_LEARNING_RATE after MAX_TRAIN_STEPS."""
    warmup_steps: int = 0
    """Raise the learning rate linearly over so many steps."""
    min_learning_rate: float = 0.0
    """Where the cosine ends."""
    adam_beta1: float = 0.9
    """AdamW's beta1."""
    adam_beta2: float = 0.999
    """AdamW's beta2."""
    adam_weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this global norm."""
    max_bad_steps: int = 100
    """Stop after so many consecutive steps skipped for a non-finite loss or gradient."""
    ema_decay: str = "0.9999"
    """Decay of the exponential moving average of the weights, per step; several, comma separated,
    keep as many EMAs, of which the first is sampled."""
    ema_warmup: bool = False
    """In step n, from 1 on, decay by min(EMA_DECAY, 1 - n^(-3/4)), so that the EMA is of recent
    weights all along; 3/4 is for runs below a million steps (0.999 after 10 K, 0.9999 after 215 K).
    """
    optimizer_impl: Literal["auto", "cuda", "torch"] = "auto"
    """One pass over memory (csrc) or torch's fused AdamW; auto takes cuda where it can run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_at_least(self, 1, "epochs", "max_train_steps", "max_bad_steps")
        expect_at_least(self, 0, "warmup_steps")
        for decay in self.ema_decays:
            if not 0 <= decay < 1:
                raise ValueError(f"ema_decay is {self.ema_decay}, expected values in [0, 1)")
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(
                f"min_learning_rate is {self.min_learning_rate}, expected 0 to learning_rate "
                f"({self.learning_rate})"
            )

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """One per EMA; the first EMA is the one that is sampled."""
        try:
            return tuple(float(decay) for decay in str(self.ema_decay).split(","))
        except ValueError:
            raise ValueError(
                f"ema_decay is {self.ema_decay!r}, expected numbers, comma separated"
            ) from None
