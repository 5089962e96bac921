"""Latents from moments; pixels from latents, by the Stable Diffusion autoencoder (diffusers)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from repa_fast.data.dataset import Metadata
from repa_fast.data.features import describing
from repa_fast.failure import Failure
from repa_fast.words import first_line, some

HUB = ("sd-vae-ft-mse", "sd-vae-ft-ema")
"""Names of Stability AI's autoencoders on the Hugging Face hub."""
SHORT = {name.rpartition("-")[2]: name for name in HUB}
"""What REPA's generate.py calls them: mse and ema."""
DECODE_BATCH = 4
"""Images at a time: activations are about 1 GB per image of 512 pixels."""


def sample(moments: torch.Tensor, noise: torch.Tensor, metadata: Metadata) -> torch.Tensor:
    """Return a fresh posterior sample (B, C, h, w): (mean + std * noise) * scale + bias.

    moments is (B, 2C, h, w), mean then standard deviation; noise (B, C, h, w), standard normal.
    """
    mean, std = moments.chunk(2, dim=1)
    return (mean + std * noise) * metadata.scale + metadata.bias


def unscaled(latents: torch.Tensor, metadata: Metadata) -> torch.Tensor:
    """Return latents (B, C, h, w) as the autoencoder, or pixels in [-1, 1], have them; fp64."""
    return (latents.double() - metadata.bias) / metadata.scale


def can_decode(metadata: Metadata) -> bool:
    """Return whether `to_pixels` needs no autoencoder: the dataset's latents are pixels."""
    return metadata.vae == "none"


def to_pixels(
    latents: torch.Tensor,
    metadata: Metadata,
    vae: "VAE | None" = None,
    *,
    rounding: bool = True,
) -> torch.Tensor:
    """Decode latents (B, C, h, w) to uint8 images (B, 3, R, R), rounded or cut off.

    Pixel latents need no `vae`.

    Raises:
        ValueError: the latents are an autoencoder's, and there is none or one that does not fit.
        RuntimeError: the autoencoder cannot be loaded.
    """
    if can_decode(metadata):
        pixels = unscaled(latents, metadata) * 127.5 + 127.5
        return (pixels.round() if rounding else pixels).clamp(0, 255).to(torch.uint8)
    if vae is None:
        raise ValueError(f"latents of {metadata.vae!r} need its decoder, expected pixel latents")
    return vae.decode(latents, metadata, rounding=rounding)


def full_name(vae: str) -> str:
    """Return the name of an autoencoder by what `--vae` says; a folder ema is ./ema there."""
    return SHORT.get(vae, vae)


class VAE:
    """A frozen AutoencoderKL that is loaded when first needed.

    It is on the device only while it decodes; between, its fp32 weights wait in host memory
    (0.3 GB) rather than be dropped, so that a later use needs neither the disk nor the network.

    Args:
        source: a name in `HUB` or `SHORT`, a folder that diffusers' save_pretrained wrote, or
            "owner/name" on the Hugging Face hub.
    """

    def __init__(self, source: str) -> None:
        self.source = full_name(source)
        self.unavailable = False
        """Whether loading was tried in vain."""
        self._model: torch.nn.Module | None = None

    def load(self, metadata: Metadata) -> torch.nn.Module:
        """Load the weights unless they are; return diffusers' module, on the CPU between uses.

        Raises:
            RuntimeError: they cannot be loaded; says what to install or fetch.
            ValueError: the autoencoder's latents are not the dataset's.
        """
        if self._model is not None:
            return self._model
        self.unavailable = True
        model = self._read()
        got = _latent_shape(model, metadata.resolution)
        if got != tuple(metadata.latent_shape):
            raise ValueError(
                f"the autoencoder {self.source} has latents {got} for images of "
                f"{metadata.resolution} pixels, expected the dataset's {metadata.latent_shape}; "
                "give another with --vae"
            )
        self._model, self.unavailable = model, False
        return model

    def _read(self) -> torch.nn.Module:
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise Failure(
                f"the autoencoder {self.source} needs diffusers (pip install diffusers): {error}"
            ) from error
        on_hub = self.source in HUB and not Path(self.source).is_dir()
        name = f"stabilityai/{self.source}" if on_hub else self.source
        try:
            # without low_cpu_mem_usage it does not ask for accelerate
            model, info = AutoencoderKL.from_pretrained(
                name, low_cpu_mem_usage=False, output_loading_info=True
            )
        except Exception as error:  # of diffusers, the hub's client, json or safetensors
            raise Failure(
                f"the autoencoder {name} is neither a folder nor can it be fetched; give "
                "--vae a folder that holds config.json and the weights, or a hub name "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
        expect_all_weights(f"the autoencoder {name}", info)
        return model.eval().requires_grad_(False)

    def metadata(self, resolution: int, class_names: tuple[str, ...]) -> Metadata:
        """Return the metadata of a dataset of this autoencoder's latents, with its own scale.

        ValueError if the resolution is no multiple of what the autoencoder reduces it by, or its
        scale is no number that latents can have.
        """
        model = self._read()
        if resolution % _factor(model):
            raise ValueError(f"resolution is {resolution}, expected a multiple of {_factor(model)}")
        self._model = model
        fields = {
            "resolution": resolution,
            "latent_shape": _latent_shape(model, resolution),
            "vae": self.source,
            "scale": model.config.scaling_factor,
            "bias": 0.0,
            "class_names": class_names,
        }
        with describing(f"the autoencoder {self.source}, its scaling_factor"):
            return Metadata.from_dict(fields)

    def encoder(
        self, metadata: Metadata, device: torch.device, dtype: torch.dtype, compiled: bool
    ) -> Callable[[np.ndarray], np.ndarray]:
        """Return a function from images, uint8 (B, 3, R, R), to moments, float32 (B, 2C, h, w).

        Moments are the mean and standard deviation of the latent, unscaled, of images scaled to
        [-1, 1]. The autoencoder stays on `device`; `dtype` is autocast's (fp32: none).
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
        """Return a function from the model's latents (B, C, h, w) to images, uint8 (B, 3, R, R).

        The autoencoder stays on `device`.

        Args:
            metadata: the dataset's, whose scale and bias the latents have.
            rounding: to the nearest level; otherwise down, as REPA's generate.py does.
            batch_size: images at a time.
            dtype: autocast's (fp32: none).
            tiled: in overlapping tiles of 512 pixels, for less memory; a little other than whole.
        """
        model = self.load(metadata).to(device)
        if tiled:
            model.enable_tiling()

        @torch.no_grad()
        def decode(latents: torch.Tensor) -> torch.Tensor:
            images = []
            for part in unscaled(latents, metadata).float().split(batch_size):
                with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                    decoded = model.decode(part).sample.float()
                levels = (255 * ((decoded + 1) / 2)).clamp(0, 255)
                images.append((levels.round() if rounding else levels).to(torch.uint8))
            return torch.cat(images)

        return decode

    def decode(self, latents: torch.Tensor, metadata: Metadata, **options) -> torch.Tensor:
        """Decode once, by `decoder` with its options; between, the autoencoder waits on the CPU."""
        decode = self.decoder(metadata, latents.device, **options)
        try:
            return decode(latents)
        finally:
            self.load(metadata).to("cpu")


def expect_all_weights(name: str, info: dict) -> None:
    """Raise ValueError where diffusers loaded a model without some of its weights.

    It would go on with random ones. `info` is what from_pretrained says with output_loading_info.
    """
    lacking = [*info["missing_keys"], *map(str, info["mismatched_keys"])]
    if lacking:
        raise ValueError(
            f"{name} lacks {len(lacking)} of its weights, or has them in other shapes: "
            f"{some(sorted(lacking))}; expected all that its config.json means"
        )


def _factor(model: torch.nn.Module) -> int:
    return 2 ** (len(model.config.block_out_channels) - 1)


def _latent_shape(model: torch.nn.Module, resolution: int) -> tuple[int, int, int]:
    side = resolution // _factor(model)
    return (model.config.latent_channels, side, side)
