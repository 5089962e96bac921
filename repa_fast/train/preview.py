"""Sample grids from the moving average."""

import math
from collections.abc import Callable

import numpy as np
import torch

from repa_fast.data import latents
from repa_fast.diffusion import ddpm_samplers
from repa_fast.diffusion.draws import stream
from repa_fast.diffusion.samplers import sample
from repa_fast.eval.pictures import arrange
from repa_fast.models.sit import SiT
from repa_fast.train.state import TrainState

GRID_IMAGES = 100


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


def sample_grid(state: TrainState, average: SiT) -> np.ndarray:
    """uint8 (H, W, 3): class-conditional samples, the same noise and labels at every step.

    `average` is the state's, whole. One column per class where there are at most ten, otherwise
    classes spread evenly.
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
    options = {
        "mode": config.mode,
        "num_steps": config.num_steps,
        "cfg_scale": config.cfg_scale,
        "seed": config.seed,
    }
    with state.autocast():
        if config.objective == "ddpm":
            samples = ddpm_samplers.sample(average, noise, labels, **options)
        else:
            flow = {"path": state.path, "prediction": config.prediction}
            samples = sample(average, noise, labels, **options, **flow)
    return arrange(latents.to_pixels(samples, state.metadata, state.vae), columns)
