"""How a model is sampled."""

from dataclasses import dataclass
from typing import Literal

import torch

from repa_fast.data.dataset import Metadata
from repa_fast.data.latents import can_decode
from repa_fast.diffusion.samplers import LAST_SDE_TIME


@dataclass(kw_only=True)
class SamplerConfig:
    """How a model is sampled; names and defaults are REPA's generate.py's where it has one."""

    mode: Literal["ode", "sde"] = "ode"
    """Probability-flow ODE, or the reverse SDE by Euler-Maruyama; of a DiT DDIM or DDPM's."""
    num_steps: int = 50
    """Model evaluations (twice as many, less one, with HEUN)."""
    heun: bool = False
    """Second-order steps of the ODE."""
    adaptive: bool = False
    """The ODE by dopri5 with adaptive steps, SiT's default; NUM_STEPS is not used."""
    cfg_scale: float = 1.5
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
    """TF32 matrix products on a GPU."""
    compile: bool = False
    """torch.compile the model, on a GPU with CUDA graphs."""
    vae: Literal["ema", "mse"] = "ema"
    """Decoder: sd-vae-ft-ema or sd-vae-ft-mse."""
    vae_path: str = ""
    """Folder or hub name of another autoencoder."""
    vae_precision: Literal["fp32", "bf16"] = "fp32"
    """Of the decoder."""
    vae_tiled: bool = False
    """Decode in tiles, for less memory; a little other than whole."""
    uint8: Literal["truncate", "round"] = "truncate"
    """How pixel values become integers; REPA's generate.py cuts off, SiT's and DiT's round."""

    def __post_init__(self) -> None:
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

    def label(self, metadata: Metadata) -> str:
        """Return the settings that differ from plain ones, fit for a file name."""
        steps = "dopri5" if self.adaptive else str(self.num_steps)
        parts = [f"{self.mode}-{steps}{'-heun' if self.heun else ''}", f"cfg-{self.cfg_scale:g}"]
        if (self.guidance_low, self.guidance_high) != (0, 1):
            parts.append(f"interval-{self.guidance_low:g}-{self.guidance_high:g}")
        if self.guidance_channels:
            parts.append(f"channels-{self.guidance_channels}")
        parts += [f"path-{self.path_type}"] if self.path_type else []
        parts += [f"pred-{self.prediction}"] if self.prediction else []
        if self.mode == "sde":
            parts.append(f"{self.diffusion_form}-{self.diffusion_norm:g}")
            parts.append(f"last-{self.last_step}-{self.last_step_size:g}")
        parts.append(self.mixed_precision if self.mixed_precision != "no" else "fp32")
        parts += [name for name in ("tf32", "compile") if getattr(self, name)]
        parts.append(f"state-{self.state_dtype}")
        if not can_decode(metadata):
            vae = self.vae_path.rstrip("/").rsplit("/", 1)[-1] or self.vae
            parts.append(f"vae-{vae}-{self.vae_precision}{'-tiled' if self.vae_tiled else ''}")
        return "-".join([*parts, self.uint8])
