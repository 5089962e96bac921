"""The model that a config and a dataset ask for."""

import torch

from repa_fast.configs.align import AlignConfig
from repa_fast.data.dataset import Metadata
from repa_fast.data.official import SD_VAE_FACTOR, SD_VAE_SCALE
from repa_fast.data.open import find_metadata
from repa_fast.diffusion.draws import stream
from repa_fast.models.sit import SiT, size
from repa_fast.objective import OBJECTIVES, build_alignment


def model_arguments(config: AlignConfig, metadata: Metadata) -> dict:
    """Return the keyword arguments of SiT for a run on a dataset.

    ValueError if config and dataset do not fit, or the encoder's tokens differ from the model's.
    """
    if config.resolution != metadata.resolution:
        raise ValueError(
            f"resolution is {config.resolution}, expected {metadata.resolution} (the dataset's)"
        )
    if config.num_classes < len(metadata.class_names):
        raise ValueError(
            f"num_classes is {config.num_classes}, "
            f"expected at least {len(metadata.class_names)} (the dataset's)"
        )
    channels, height, width = metadata.latent_shape
    if height != width:
        raise ValueError(f"latents are {height}x{width}, expected a square")
    arguments = size(config.model)
    for name in arguments:
        if getattr(config, name) is not None:
            arguments[name] = getattr(config, name)
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
    side = config.resolution // SD_VAE_FACTOR
    return Metadata(
        resolution=config.resolution,
        latent_shape=(4, side, side),
        vae="sd-vae-ft-mse",
        scale=SD_VAE_SCALE,
        bias=0.0,
        class_names=tuple(map(str, range(config.num_classes))),
    )
