"""Images of a model, by their numbers: a function of (weights, settings, seed, number) alone.

Noise, label and everything the sampler draws depend on the number of an image and not on its batch
or process, so that the same images come from 1 or 64 GPUs.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from repa_fast import ops
from repa_fast.configs.sampler import SamplerConfig
from repa_fast.data.dataset import Metadata
from repa_fast.data.latents import HUB, VAE, can_decode, full_name, to_pixels
from repa_fast.eval.load import HASH_DIGITS, Loaded, Trained
from repa_fast.whole import parse_json, read_regular, write_whole

NOISE_STEP = 2**32 - 1
"""Counter of the initial noise; the sampler's own steps count from 0."""
LABEL_KEY = 7
LONGEST_HEAD = 62
"""Letters of a file's name before its hash: it has fewer than 80, since others are put around."""
INDIFFERENT = (
    "ckpt", "weights", "sample_dir", "out", "pngs", "origin", "model", "resolution", "num_classes",
    "encoder_depth", "projector_embed_dims", "qk_norm", "legacy", "verify",
)  # fmt: skip
"""Settings that do not decide the images, once the weights are loaded."""


def settings(config: SamplerConfig, loaded: Loaded) -> dict:
    """Return everything that decides the images, for the JSON beside them."""
    names = [field.name for field in fields(config) if field.name not in INDIFFERENT]
    return {name: getattr(config, name) for name in names} | {
        "weights": loaded.weights,
        "digest": loaded.digest,
        "step": loaded.step,
        "num_heads": loaded.model.blocks[0].attn.num_heads,
        "path_type": config.path_type or loaded.objective.path_type,
        "prediction": config.prediction or loaded.objective.prediction,
        "vae": decoder_of(config, loaded.metadata),
        "torch": torch.__version__,
    }


def file_name(head: str, described: dict, loaded: Loaded, tail: str = "") -> str:
    """Return a file name, without its ending, of images that are `described` as by `settings`.

    It has what people look for, and a hash of all that decides the images: other settings are
    another name. Torch's version is left out, by which they may differ in the last bit.
    """
    steps = "dopri5" if described["adaptive"] else described["num_steps"]
    sampler = f"{described['mode']}-{steps}-cfg-{described['cfg_scale']:g}"
    decisive = {name: value for name, value in described.items() if name != "torch"}
    digits = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:HASH_DIGITS]
    return f"{head}-{loaded.place}-{sampler}{tail}"[:LONGEST_HEAD] + f"-{digits}"


def write_settings(picture: Path, described: dict, source: Path) -> None:
    """Write what is `described` as JSON beside a picture, with where the weights are."""
    described |= {"ckpt": str(source.resolve())}
    write_whole(picture.with_suffix(".json"), json.dumps(described, indent=2) + "\n")


def line_of(picture: Path) -> str:
    """Return the line that names a picture, with guidance and weights by the JSON beside it."""
    beside = picture.with_suffix(".json")
    described = parse_json(read_regular(beside), beside)
    step, weights = described["step"], f"weights {described['weights']}".strip()
    if isinstance(step, list):
        of = f"steps {step[0]} to {step[-1]}" if len(step) > 1 else f"step {step[0]}"
    else:
        of = Path(described["ckpt"]).name if step is None else f"step {step}"
    return f"{picture} (guidance {described['cfg_scale']:g}, {weights} of {of})"


def decoder_of(config: SamplerConfig, metadata: Metadata) -> str:
    """Return the name of the autoencoder that decodes, none where latents are pixels."""
    if can_decode(metadata):
        return "none"
    return full_name(config.vae) or ("sd-vae-ft-ema" if metadata.vae in HUB else metadata.vae)


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
        return VAE(decoder_of(config, metadata)).decoder(
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
