"""How a run is sampled and evaluated while it trains."""

from dataclasses import dataclass
from typing import Literal

from repa_fast.configs.part import Part, expect_at_least
from repa_fast.configs.sampler import GUIDANCE, SamplerConfig


@dataclass(kw_only=True)
class EvaluateConfig(Part):
    """Sample grids, and evaluations while a run trains."""

    mode: Literal["ode", "sde"] = "ode"
    """Sampler of the sample grids and evaluations: euler or euler_maruyama; with OBJECTIVE ddpm
    ode is DDIM and sde DDPM's ancestral one."""
    num_steps: int = 50
    """Steps of that sampler."""
    cfg_scale: float = GUIDANCE
    """Its guidance scale; 1 is none."""
    vae: str = ""
    """Autoencoder: ema (sd-vae-ft-ema), mse (sd-vae-ft-mse), a folder, or owner/name on the hub.
    Where empty, the dataset's for sample grids, and that of `repa-fast generate` in evaluations."""
    eval_every: int = 0
    """Evaluate samples of the EMA every so many steps, and at the end; 0 never."""
    eval_samples: int = 10_000
    """Samples of each evaluation, over all processes."""
    eval_features: str = "inception"
    """inception (FID, sFID and so on); fitted, a classifier fitted on the dataset's rows;
    digits-judge; or an encoder's name."""
    eval_weights: str = ""
    """File of its weights; its own source where empty."""
    eval_reference: str = ""
    """The .npz to compare with, as ADM publishes them; all images of the dataset where empty."""

    def sampler(self, **options) -> SamplerConfig:
        """Return the settings of the sampler, `options` beside them."""
        return SamplerConfig(
            mode=self.mode, num_steps=self.num_steps, cfg_scale=self.cfg_scale, **options
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_at_least(self, 1, "eval_samples")
        expect_at_least(self, 0, "eval_every")
