"""The Stable Diffusion autoencoder, through diffusers: pixels from latents, and back."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from repa_fast.data.dataset import Metadata

HUB = {
    "sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse",
    "sd-vae-ft-ema": "stabilityai/sd-vae-ft-ema",
}
DECODE_BATCH = 4
"""Images at a time: activations are about 1 GB per image of 512 pixels."""


class VAE:
    """A frozen AutoencoderKL that is loaded when first needed.

    It is on the device only while it decodes; between, its fp32 weights wait in host memory
    (0.3 GB) rather than be dropped, so that a later use needs neither the disk nor the network.

    Args:
        source: a name in `HUB`, a folder that diffusers' save_pretrained wrote, or "owner/name" on
            the Hugging Face hub.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.unavailable = False
        """Whether loading was tried in vain."""
        self._model: torch.nn.Module | None = None

    def load(self, metadata: Metadata) -> torch.nn.Module:
        """Load the weights unless they are; returns diffusers' module, on the CPU between uses.

        Raises:
            RuntimeError: they cannot be loaded; says what to install or fetch.
            ValueError: the autoencoder's latents are not the dataset's.
        """
        if self._model is None:
            self.unavailable = True
            model = self._read()
            self._check(model, metadata)
            self._model = model.eval().requires_grad_(False)
            self.unavailable = False
        return self._model

    def _read(self) -> torch.nn.Module:
        remedy = "give --vae-path a folder that holds config.json and the weights, or a hub name"
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise RuntimeError(
                f"the autoencoder {self.source} needs diffusers (pip install diffusers): {error}"
            ) from error
        name = self.source if Path(self.source).is_dir() else HUB.get(self.source, self.source)
        try:
            # without low_cpu_mem_usage it does not ask for accelerate
            return AutoencoderKL.from_pretrained(name, low_cpu_mem_usage=False)
        except Exception as error:  # of diffusers, the hub's client, json or safetensors
            reason = next(iter(str(error).splitlines()), "")
            raise RuntimeError(
                f"the autoencoder {name} is neither a folder nor can it be fetched; {remedy} "
                f"({type(error).__name__}: {reason})"
            ) from error

    def _check(self, model: torch.nn.Module, metadata: Metadata) -> None:
        factor = 2 ** (len(model.config.block_out_channels) - 1)
        side = metadata.resolution // factor
        got = (model.config.latent_channels, side, side)
        if got != tuple(metadata.latent_shape):
            raise ValueError(
                f"the autoencoder {self.source} has latents {got} for images of "
                f"{metadata.resolution} pixels, expected the dataset's {metadata.latent_shape}; "
                "give another with --vae-path"
            )

    def metadata(self, resolution: int, class_names: tuple[str, ...]) -> Metadata:
        """Of a dataset of this autoencoder's latents, with its own scale.

        Raises:
            RuntimeError: as `load`.
            ValueError: the resolution is no multiple of what the autoencoder reduces it by.
        """
        model = self._read()
        factor = 2 ** (len(model.config.block_out_channels) - 1)
        if resolution % factor:
            raise ValueError(f"resolution is {resolution}, expected a multiple of {factor}")
        self._model = model.eval().requires_grad_(False)
        side = resolution // factor
        return Metadata(
            resolution=resolution,
            latent_shape=(model.config.latent_channels, side, side),
            vae=self.source,
            scale=model.config.scaling_factor,
            bias=0.0,
            class_names=class_names,
        )

    def encoder(
        self, metadata: Metadata, device: torch.device, dtype: torch.dtype, compiled: bool
    ) -> Callable[[np.ndarray], np.ndarray]:
        """A function from images, uint8 (B, 3, R, R), to moments, float32 (B, 2C, h, w).

        Moments are the mean and standard deviation of the latent, unscaled, of images scaled to
        [-1, 1]. The autoencoder stays on `device`; `dtype` is autocast's (fp32: none).

        Raises:
            RuntimeError, ValueError: as `load`.
        """
        model = self.load(metadata).to(device)
        run = torch.compile(model.encode) if compiled else model.encode

        @torch.no_grad()
        def encode(pixels: np.ndarray) -> np.ndarray:
            x = torch.from_numpy(pixels).to(device).float() / 127.5 - 1
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                latent = run(x).latent_dist
            return torch.cat([latent.mean, latent.std], dim=1).float().cpu().numpy()

        return encode

    def decoder(
        self,
        metadata: Metadata,
        device: torch.device,
        *,
        rounding: bool = True,
        batch_size: int = DECODE_BATCH,
        dtype: torch.dtype = torch.float32,
        tiled: bool = False,
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function from latents as the model has them to images, uint8 (B, 3, R, R).

        Latents are (B, C, h, w), times the dataset's scale, plus its bias. The autoencoder stays on
        `device`.

        Args:
            metadata: the dataset's.
            rounding: to the nearest level; otherwise down, as REPA's generate.py does.
            batch_size: images at a time.
            dtype: autocast's (fp32: none).
            tiled: in overlapping tiles of 512 pixels, for less memory; a little other than whole.

        Raises:
            RuntimeError, ValueError: as `load`.
        """
        model = self.load(metadata).to(device)
        if tiled:
            model.enable_tiling()

        @torch.no_grad()
        def decode(latents: torch.Tensor) -> torch.Tensor:
            unscaled = ((latents.double() - metadata.bias) / metadata.scale).float()
            images = []
            for part in unscaled.split(batch_size):
                with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                    decoded = model.decode(part).sample.float()
                levels = (255 * ((decoded + 1) / 2)).clamp(0, 255)
                images.append((levels.round() if rounding else levels).to(torch.uint8))
            return torch.cat(images)

        return decode

    def decode(self, latents: torch.Tensor, metadata: Metadata, **options) -> torch.Tensor:
        """As `decoder`, with its options, once; between, the autoencoder waits on the CPU."""
        decode = self.decoder(metadata, latents.device, **options)
        try:
            return decode(latents)
        finally:
            self.load(metadata).to("cpu")
