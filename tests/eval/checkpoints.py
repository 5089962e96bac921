"""Tiny models that predict something, as every kind of file that people have."""

import argparse
import dataclasses
from pathlib import Path

import torch

from repa_fast.configs import presets
from repa_fast.data.dataset import Metadata
from repa_fast.data.digits import digits_metadata
from repa_fast.distributed import World
from repa_fast.models.sit import SiT
from repa_fast.train import checkpoint
from repa_fast.train.state import build_state

TINY = {"hidden_size": 32, "depth": 3, "num_heads": 4, "encoder_depth": 2, "projector_dim": 16}
LATENTS = Metadata(
    resolution=16, latent_shape=(4, 8, 8), vae="sd-vae-ft-mse", scale=0.5, bias=0.25,
    class_names=("cat", "dog", "red fox", "arctic fox"),
)  # fmt: skip
"""Of latents that tests.eval.checkpoints.autoencoder decodes."""


def sit(seed: int = 0, **overrides) -> SiT:
    """A model of 8x8x4 latents and 5 classes; one at its initialisation would predict zero."""
    torch.manual_seed(seed)
    arguments = {"input_size": 8, "patch_size": 2, "in_channels": 4, "num_classes": 5}
    return randomise(SiT(**TINY | arguments | {"z_dims": (12,)} | overrides))


def randomise(model: SiT) -> SiT:
    """adaLN and final layers and the label table ~ N(0, 0.2), so that every input matters."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("adaLN", "final_layer", "embedding_table")):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def run(folder: Path, metadata: Metadata | None = None, steps=(7,), **overrides) -> Path:
    """A run's folder with checkpoints; the average differs from the weights, and by step."""
    metadata = metadata or digits_metadata()
    known = {"resolution": metadata.resolution, "num_classes": len(metadata.class_names)}
    config = dataclasses.replace(presets.get("digits"), **TINY | known | overrides)
    state = build_state(config, metadata, World(0, 1, torch.device("cpu")))
    for state.step in steps:
        torch.manual_seed(state.step)
        randomise(state.model)
        randomise(state.ema)
        checkpoint.save(folder / "checkpoints", state)
    return folder


def official(path: Path, model: SiT, step: int = 7, **args) -> Path:
    """{model, ema, opt, args, steps}, `ema` being the model's weights."""
    contents = {"model": sit(seed=100).state_dict(), "ema": model.state_dict(), "steps": step}
    contents |= {"opt": {"state": {}, "param_groups": []}, "args": argparse.Namespace(**args)}
    torch.save(contents, path)
    return path


def of_original_sit(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict as the original SiT's: twice the output channels, no projectors."""
    state = {name: t for name, t in state.items() if not name.startswith("projectors.")}
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[name].unflatten(0, (4, 4))  # P * P patches of C channels
        state[name] = torch.cat([rows, torch.randn_like(rows)], dim=1).flatten(0, 1)
    return state


def autoencoder(folder: Path, seed: int = 0) -> Path:
    """A folder with a random AutoencoderKL of 16 pixels to 8x8x4 latents."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        layers_per_block=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder
