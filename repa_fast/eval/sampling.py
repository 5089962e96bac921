"""Images of a model, by their numbers: a function of (weights, settings, seed, number) alone.

Noise, label and everything the sampler draws depend on the number of an image and not on its batch
or process, so that the same images come from 1 or 64 GPUs.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

from repa_fast import ops
from repa_fast.configs.sampler import SamplerConfig
from repa_fast.data.latents import VAE, can_decode, to_pixels
from repa_fast.eval.load import Trained

NOISE_STEP = 2**32 - 1
"""Counter of the initial noise; the sampler's own steps count from 0."""
LABEL_KEY = 7


def labels_of(
    index: np.ndarray, num_classes: int, seed: int, kind: Literal["random", "balanced"]
) -> np.ndarray:
    """Return labels, int64, of images by their numbers (B): drawn, or one class after the other."""
    if kind == "balanced":
        return index % num_classes
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(LABEL_KEY,)))
    drawn = np.random.Generator(bits).integers(num_classes, size=int(index.max(initial=-1)) + 1)
    return drawn[index]


class ImageSampler:
    """Images of a model under a config.

    Args:
        trained: the model, its dataset's metadata and its objective.
        config: path_type and prediction stand over those of the objective where they are given.

    Raises:
        ValueError: settings that do not fit the model.
        RuntimeError: the autoencoder cannot be loaded.
    """

    def __init__(self, trained: Trained, config: SamplerConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.model, self.metadata = trained.model, trained.metadata
        self.objective = trained.objective.under(config)
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.tf32
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        if config.compile and device.type == "cuda":
            self.model.compile(mode="reduce-overhead", dynamic=False)
        elif config.compile:
            for block in self.model.blocks:
                # a graph for each batch size, so that none depends on which came first
                block.compile(fullgraph=True, dynamic=False)
        self._decode = self._decoder()

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
        """Return the initial noise (B, C, h, w), fp32, of images by their numbers (B)."""
        shape = torch.Size((len(index), *self.metadata.latent_shape))
        return ops.standard_normal(shape, seed, NOISE_STEP, self._to_device(index))

    @torch.no_grad()
    def latents(self, index: np.ndarray, labels: np.ndarray, seed: int) -> torch.Tensor:
        """Sample (B, C, h, w), in the state's dtype, images by their numbers (B) and labels."""
        y, numbers, noise = self._to_device(labels), self._to_device(index), self.noise(index, seed)
        half = self.config.mixed_precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            return self.objective.sample(
                self.model, noise, y, self.config, seed=seed, index=numbers
            )

    def images(self, index: np.ndarray, labels: np.ndarray, seed: int) -> torch.Tensor:
        """Return images, uint8 (B, 3, R, R), on the device."""
        return self._decode(self.latents(index, labels, seed))

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, np.int64)).to(self.device)
