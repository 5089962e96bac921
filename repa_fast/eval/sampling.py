"""Images of a model, by their numbers: a function of (weights, settings, seed, number) alone.

Noise, label and everything the sampler draws depend on the number of an image and not on its batch
or process, so that the same images come from 1 or 64 GPUs.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from repa_fast import ops
from repa_fast.data.dataset import Metadata
from repa_fast.data.latents import can_decode, to_pixels
from repa_fast.data.vae import VAE
from repa_fast.diffusion import ddpm_samplers, samplers
from repa_fast.diffusion.adaptive import dopri5
from repa_fast.diffusion.path import get
from repa_fast.eval.load import Loaded

NOISE_STEP = 2**32 - 1
"""Counter of the initial noise; the sampler's own steps count from 0."""
LABEL_KEY = 7


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
    last_step_size: float = samplers.LAST_SDE_TIME
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

    def label(self, metadata: Metadata) -> str:
        """The settings that differ from plain ones, fit for a file name."""
        steps = "dopri5" if self.adaptive else str(self.num_steps)
        parts = [f"{self.mode}-{steps}{'-heun' if self.heun else ''}", f"cfg-{self.cfg_scale:g}"]
        if (self.guidance_low, self.guidance_high) != (0, 1):
            parts.append(f"interval-{self.guidance_low:g}-{self.guidance_high:g}")
        if self.guidance_channels:
            parts.append(f"channels-{self.guidance_channels}")
        parts += [f"{name}-{value}" for name, value in (
            ("path", self.path_type), ("pred", self.prediction)) if value]  # fmt: skip
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


def labels_of(
    index: np.ndarray, num_classes: int, seed: int, kind: Literal["random", "balanced"]
) -> np.ndarray:
    """Class labels, int64, of images by their numbers (B): drawn, or one class after the other."""
    if kind == "balanced":
        return index % num_classes
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(LABEL_KEY,)))
    drawn = np.random.Generator(bits).integers(num_classes, size=int(index.max(initial=-1)) + 1)
    return drawn[index]


def _expect_plain(config: SamplerConfig) -> None:
    """Raise ValueError where a DiT is to be sampled with what only flow models have."""
    plain = SamplerConfig()
    for name in ("heun", "adaptive", "guidance_low", "guidance_high", "path_type", "prediction"):
        if getattr(config, name) != getattr(plain, name):
            raise ValueError(
                f"{name} is {getattr(config, name)}, expected {getattr(plain, name)!r}: the model "
                "is a DiT, which has no flow"
            )


class ImageSampler:
    """Images of a loaded model under a config.

    Raises:
        ValueError: settings that do not fit the model.
        RuntimeError: the autoencoder cannot be loaded.
    """

    def __init__(self, loaded: Loaded, config: SamplerConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.metadata = loaded.metadata
        self.objective = loaded.objective
        self.path = get(config.path_type) if config.path_type else loaded.path
        if self.objective == "ddpm":
            _expect_plain(config)
        self.prediction = config.prediction or loaded.prediction
        self.model = loaded.model
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.tf32
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        if config.compile:
            self._compile()
        self._decode = self._decoder()

    def _compile(self) -> None:
        if self.device.type == "cuda":
            self.model.compile(mode="reduce-overhead", dynamic=False)
            return
        for block in self.model.blocks:
            # a graph for each batch size, so that none depends on which came first
            block.compile(fullgraph=True, dynamic=False)

    def _decoder(self) -> Callable[[torch.Tensor], torch.Tensor]:
        config, metadata = self.config, self.metadata
        rounding = config.uint8 == "round"
        if can_decode(metadata):
            return lambda latents: to_pixels(latents, metadata, rounding=rounding)
        known = metadata.vae.startswith("sd-vae-ft-")
        source = config.vae_path or (f"sd-vae-ft-{config.vae}" if known else metadata.vae)
        return VAE(source).decoder(
            metadata,
            self.device,
            rounding=rounding,
            dtype=torch.bfloat16 if config.vae_precision == "bf16" else torch.float32,
            tiled=config.vae_tiled,
        )

    def noise(self, index: np.ndarray, seed: int) -> torch.Tensor:
        """Initial noise (B, C, h, w), fp32, of images by their numbers (B)."""
        numbers = torch.from_numpy(np.asarray(index, np.int64)).to(self.device)
        shape = torch.Size((len(index), *self.metadata.latent_shape))
        return ops.standard_normal(shape, seed, NOISE_STEP, numbers)

    @torch.no_grad()
    def latents(self, index: np.ndarray, labels: np.ndarray, seed: int) -> torch.Tensor:
        """Samples (B, C, h, w) in the state's dtype, of images by their numbers (B) and labels."""
        config = self.config
        options = {
            "cfg_scale": config.cfg_scale,
            "guidance_channels": config.guidance_channels or None,
            "state_dtype": {"fp64": torch.float64, "fp32": torch.float32}[config.state_dtype],
        }
        noise = self.noise(index, seed)
        y = torch.from_numpy(np.asarray(labels, np.int64)).to(self.device)
        numbers = torch.from_numpy(np.asarray(index, np.int64)).to(self.device)
        if self.objective == "ddpm":
            options |= {"num_steps": config.num_steps, "seed": seed, "index": numbers}
            with self._precision():
                return ddpm_samplers.sample(self.model, noise, y, mode=config.mode, **options)
        options |= {
            "guidance_interval": (config.guidance_low, config.guidance_high),
            "path": self.path,
            "prediction": self.prediction,
        }
        with self._precision():
            if config.adaptive:
                return dopri5(self.model, noise, y, **options)[0]
            options["num_steps"] = config.num_steps
            if config.mode == "ode":
                return samplers.euler(self.model, noise, y, heun=config.heun, **options)
            return samplers.euler_maruyama(
                self.model,
                noise,
                y,
                diffusion_form=config.diffusion_form,
                diffusion_norm=config.diffusion_norm,
                last_step=config.last_step,
                last_step_size=config.last_step_size,
                seed=seed,
                index=numbers,
                **options,
            )

    def images(self, index: np.ndarray, labels: np.ndarray, seed: int) -> torch.Tensor:
        """uint8 (B, 3, R, R), on the device."""
        return self._decode(self.latents(index, labels, seed))

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.config.mixed_precision == "no":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)
