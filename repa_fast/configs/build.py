"""The model that a config and a dataset ask for."""

import dataclasses
from typing import TypeVar

import torch

from repa_fast.configs.align import AlignConfig
from repa_fast.configs.model import ModelConfig
from repa_fast.data.dataset import Metadata
from repa_fast.data.official import SD_VAE_FACTOR, SD_VAE_SCALE
from repa_fast.data.open import find_metadata
from repa_fast.diffusion.draws import stream
from repa_fast.models.sit import SiT, size
from repa_fast.objective import OBJECTIVES, build_alignment

RESOLUTION, CLASSES = 256, 1000
"""ImageNet's, where nothing says them."""
Config = TypeVar("Config", bound=AlignConfig)


def fit_to_data(config: Config, metadata: Metadata) -> Config:
    """Return the config with what it leaves to the dataset: resolution and number of classes.

    ValueError where it does not, and they do not fit the dataset.
    """
    resolution, classes = metadata.resolution, len(metadata.class_names)
    if config.resolution not in (None, resolution):
        raise ValueError(
            f"resolution is {config.resolution}, expected {resolution} (the dataset's)"
        )
    if config.num_classes is not None and config.num_classes < classes:
        raise ValueError(
            f"num_classes is {config.num_classes}, expected at least {classes} (the dataset's)"
        )
    taken = {"resolution": resolution, "num_classes": config.num_classes or classes}
    return dataclasses.replace(config, **taken)


def sizes(config: ModelConfig) -> dict[str, int]:
    """Return width, depth, heads and patch size of the model, with what overrides them."""
    named = size(config.model)
    return {k: v if getattr(config, k) is None else getattr(config, k) for k, v in named.items()}


def model_arguments(config: AlignConfig, metadata: Metadata) -> dict:
    """Return the keyword arguments of SiT for a run on a dataset.

    ValueError if config and dataset do not fit, or the encoder's tokens differ from the model's.
    """
    config = fit_to_data(config, metadata)
    channels, height, width = metadata.latent_shape
    if height != width:
        raise ValueError(f"latents are {height}x{width}, expected a square")
    arguments = sizes(config)
    alignment = build_alignment(config)
    alignment.expect_model(arguments["depth"], (height // arguments["patch_size"]) ** 2)
    same = ("path_type", "num_classes", "projector_dim", "projector", "fused_attn", "qk_norm")
    return {
        **arguments,
        **{name: getattr(config, name) for name in same},
        "input_size": height,
        "in_channels": channels,
        "class_dropout_prob": config.cfg_prob,
        "self_align": False,
        **alignment.model_arguments(),
    }


def build_model(config: AlignConfig, metadata: Metadata) -> SiT:
    """Return the model with initial weights, a pure function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(config.seed).initial_seed())
        return OBJECTIVES[config.objective].model(**model_arguments(config, metadata))


def empty_model(config: AlignConfig, metadata: Metadata, device: torch.device | str) -> SiT:
    """Return the run's model, its weights not set; on "meta" without memory."""
    with torch.device("meta"):
        model = OBJECTIVES[config.objective].model(**model_arguments(config, metadata))
    return model.to_empty(device=device)


def expected_metadata(config: AlignConfig) -> Metadata:
    """Return the dataset's metadata; where it is not there yet, what the flags make of it."""
    if found := find_metadata(config.data_dir):
        return found
    resolution = config.resolution or RESOLUTION
    side = resolution // SD_VAE_FACTOR
    return Metadata(
        resolution=resolution,
        latent_shape=(4, side, side),
        vae="sd-vae-ft-mse",
        scale=SD_VAE_SCALE,
        bias=0.0,
        class_names=tuple(map(str, range(config.num_classes or CLASSES))),
    )
