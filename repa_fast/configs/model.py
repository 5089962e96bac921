"""The model that a config and a dataset ask for."""

import torch

from repa_fast import encoders
from repa_fast.configs.config import TrainConfig
from repa_fast.data.dataset import Metadata
from repa_fast.diffusion.draws import stream
from repa_fast.models.dit import DiT
from repa_fast.models.sit import SiT, size


def model_arguments(config: TrainConfig, metadata: Metadata) -> dict:
    """Keyword arguments of SiT for a run on a dataset.

    Raises:
        ValueError: config and dataset do not fit, or the encoder's tokens differ from the model's.
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
    for name in ("hidden_size", "depth", "num_heads", "patch_size"):
        if getattr(config, name) is not None:
            arguments[name] = getattr(config, name)
    if config.align == "sra" and config.block_out_t > arguments["depth"]:
        raise ValueError(
            f"block_out_t is {config.block_out_t}, expected at most the depth, {arguments['depth']}"
        )
    specs = encoders.specs(config.enc_type)
    tokens = (height // arguments["patch_size"]) ** 2
    for spec in specs:
        if spec.num_tokens(config.resolution) != tokens:
            raise ValueError(
                f"encoder {spec.name} gives {spec.num_tokens(config.resolution)} tokens, "
                f"expected {tokens} (the transformer's)"
            )
    return {
        **arguments,
        "path_type": config.path_type,
        "input_size": height,
        "in_channels": channels,
        "num_classes": config.num_classes,
        "encoder_depth": config.block_out_s if config.align == "sra" else config.encoder_depth,
        "class_dropout_prob": config.cfg_prob,
        "z_dims": [spec.width for spec in specs],
        "projector_dim": config.projector_dim,
        "projector": config.projector,
        "fused_attn": config.fused_attn,
        "qk_norm": config.qk_norm,
        "self_align": config.align == "sra",
    }


def build_model(config: TrainConfig, metadata: Metadata) -> SiT:
    """SiT or DiT: the model with initial weights, a pure function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(config.seed).initial_seed())
        return model_class(config.objective)(**model_arguments(config, metadata))


def model_class(objective: str) -> type[SiT]:
    """SiT for flow, DiT for ddpm."""
    return {"flow": SiT, "ddpm": DiT}[objective]
