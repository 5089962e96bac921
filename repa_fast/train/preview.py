"""Sample grids from the moving average."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from repa_fast.data import latents
from repa_fast.diffusion.draws import stream
from repa_fast.diffusion.samplers import sample
from repa_fast.train.state import TrainState

GRID_IMAGES = 100
SHOWN_PIXELS = 48
"""Images smaller than this are enlarged by a whole factor, for people to see them."""
GAP = 4
GAP_GREY = 64


def can_sample(state: TrainState, warn: Callable[[str], None]) -> bool:
    """Whether there can be sample grids: they need the autoencoder of latents that are not pixels.

    It is loaded here. The first time that fails, `warn` gets one line; training goes on.
    """
    if state.vae is None:
        return True
    if state.vae.unavailable:
        return False
    try:
        state.vae.load(state.metadata)
    except (RuntimeError, ValueError) as error:
        warn(f"warning: no sample grids in this run: {error}")
        return False
    return True


def sample_grid(state: TrainState) -> np.ndarray:
    """uint8 (H, W, 3): class-conditional samples, the same noise and labels at every step.

    One column per class where there are at most ten, otherwise classes spread evenly.
    """
    config, device = state.config, state.world.device
    classes = len(state.metadata.class_names)
    columns = min(classes, math.isqrt(GRID_IMAGES))
    rows = GRID_IMAGES // columns
    labels = torch.arange(rows * columns, device=device) % columns
    if classes > columns:
        labels = (torch.arange(rows * columns, device=device) * classes) // (rows * columns)
    generator = stream(config.seed, 0, device=device)
    noise = torch.randn(
        (len(labels), *state.metadata.latent_shape), generator=generator, device=device
    )
    with state.autocast():
        samples = sample(
            state.ema,
            noise,
            labels,
            mode=config.mode,
            num_steps=config.num_steps,
            cfg_scale=config.cfg_scale,
            path=state.path,
            seed=config.seed,
        )
    return arrange(latents.to_pixels(samples, state.metadata, state.vae), columns)


def arrange(pixels: torch.Tensor, columns: int) -> np.ndarray:
    """uint8 images (B, 3, R, R) -> one picture (H, W, 3), row by row, small images enlarged.

    GAP grey pixels lie between neighbours, and grey fills what is left of the last row.
    """
    factor = max(1, round(SHOWN_PIXELS / pixels.shape[-1]))
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    pixels = F.pad(pixels, (0, GAP, 0, GAP), value=GAP_GREY)
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    canvas = pixels.new_full((rows * columns, channels, height, width), GAP_GREY)
    canvas[:count] = pixels
    grid = canvas.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    picture = grid.reshape(rows * height, columns * width, channels)
    return picture[:-GAP, :-GAP].cpu().numpy()


def save_png(picture: np.ndarray, path: Path) -> None:
    """Write uint8 (H, W, 3) as PNG."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
