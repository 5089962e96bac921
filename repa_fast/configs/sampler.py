"""How a model is sampled."""

from dataclasses import dataclass
from typing import Literal

import torch

from repa_fast.configs.part import Part
from repa_fast.diffusion.samplers import LAST_SDE_TIME

GUIDANCE = 1.5
"""The scale of the guidance where none is given, of sampling and of training's grids alike."""


@dataclass(kw_only=True)
class SamplerConfig(Part):
    """How a model is sampled; names and defaults are REPA's generate.py's where it has one."""

    mode: Literal["ode", "sde"] = "ode"
    """Probability-flow ODE, or the reverse SDE by Euler-Maruyama; of a DiT DDIM or DDPM's."""
    num_steps: int = 50
    """Model evaluations (twice as many, less one, with HEUN)."""
    heun: bool = False
    """Second-order steps of the ODE."""
    adaptive: bool = False
    """The ODE by dopri5 with adaptive steps, SiT's default; NUM_STEPS is not used."""
    cfg_scale: float = GUIDANCE
    """Guidance scale; 1 is none."""
    guidance_low: float = 0.0
    """Guidance acts from this t (0 is data) ..."""
    guidance_high: float = 1.0
    """... to this one."""
    guidance_channels: int = 0
    """Guide so many leading latent channels (SiT and DiT: 3); 0 guides all."""
    path_type: str = ""
    """linear, cosine (GVP) or VP; the checkpoint's where empty."""
    prediction: str = ""
    """v, score or noise; the checkpoint's where empty."""
    diffusion_form: str = "linear"
    """w(t) of the SDE: constant, SBDM, sigma, linear, decreasing, increasing-decreasing."""
    diffusion_norm: float = 1.0
    """Its norm."""
    last_step: Literal["mean", "euler", "tweedie", "none"] = "mean"
    """The SDE's last step, which has no noise."""
    last_step_size: float = LAST_SDE_TIME
    """Its length."""
    state_dtype: Literal["fp64", "fp32"] = "fp64"
    """Of the state between the model's evaluations."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Of the model's evaluations."""
    tf32: bool = True
    """TF32 matmuls on a GPU."""
    compile: bool = False
    """torch.compile the model, on a GPU with CUDA graphs."""
    vae: str = ""
    """Decoder: ema (sd-vae-ft-ema), mse (sd-vae-ft-mse), a folder, or owner/name on the hub. Where
    empty, sd-vae-ft-ema for latents of either of those two, else the dataset's own."""
    vae_precision: Literal["fp32", "bf16"] = "fp32"
    """Of the decoder."""
    vae_tiled: bool = False
    """Decode in tiles, for less memory; a little other than whole."""
    uint8: Literal["truncate", "round"] = "truncate"
    """How pixel values become integers; REPA's generate.py cuts off, SiT's and DiT's round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adaptive and (self.mode != "ode" or self.heun):
            raise ValueError("adaptive is for the ODE without heun, expected one of them")
        if not 0 <= self.guidance_low <= self.guidance_high <= 1:
            raise ValueError(
                f"guidance_low is {self.guidance_low} and guidance_high {self.guidance_high}, "
                "expected 0 <= low <= high <= 1"
            )

    def guidance(self) -> dict:
        """Return the options that every sampler takes."""
        return {
            "cfg_scale": self.cfg_scale,
            "guidance_channels": self.guidance_channels or None,
            "state_dtype": {"fp64": torch.float64, "fp32": torch.float32}[self.state_dtype],
        }
