"""`repa-fast pca`: hidden states as pictures, three main directions as red, green and blue."""

from dataclasses import dataclass

import numpy as np
import torch

from repa_fast.analysis.gather import AnalysisConfig, open_splits
from repa_fast.analysis.hidden import hidden_states, sample_noise
from repa_fast.data import latents
from repa_fast.data.loader import read_batch
from repa_fast.distributed import own_device
from repa_fast.eval.pictures import arrange, save_png

SHOWN_SIDE = 96
"""About how many pixels a side is shown with."""


@dataclass(kw_only=True)
class PcaConfig(AnalysisConfig):
    """`repa-fast pca`: for each image a picture, one row per layer, one column per time."""

    rows: tuple[int, ...] = (0, 1, 2, 3)
    """Images, by their row numbers in the val split where there is one."""


def pca(config: PcaConfig) -> str:
    """Write pca-ROW.png, and the image itself as image-ROW.png; return the names of the former.

    The directions of a layer at a time are those of the patches of all the images together, so
    that equal colours mean the same in all pictures.

    Raises:
        ValueError: weights, dataset or layers that do not fit, or a row that is not there.
    """
    device = own_device()
    loaded = config.load(device)
    out = config.output_folder(loaded, "pca")
    data_dir, _ = config.run_defaults(loaded)
    _, dataset, _ = open_splits(data_dir)
    for row in config.rows:
        if not 0 <= row < len(dataset):
            raise ValueError(f"row is {row}, expected 0..{len(dataset) - 1}")
    batch = read_batch(dataset, np.array(config.rows))
    draws = sample_noise(config.seed, batch["index"], dataset.metadata.latent_shape).to(device)
    clean = latents.sample(batch["moments"].to(device), draws[:, 0], dataset.metadata)
    layers = config.layers_of(loaded)
    maps = []
    for t in config.times:
        states = hidden_states(
            loaded.model, clean, draws[:, 1], t, path=loaded.objective.path, average=False
        )
        maps.append(torch.stack([colours(states[layer - 1]) for layer in layers]))
    pictures = torch.stack(maps, dim=1)  # layers, times, B, 3, side, side
    titles = [f"block {layer}, t={t:g}" for layer in layers for t in config.times]
    files = []
    for number, row in enumerate(config.rows):
        tiles = pictures[:, :, number].flatten(0, 1)
        files.append(out / f"pca-{row}.png")
        save_png(arrange(tiles, len(config.times), titles, SHOWN_SIDE), files[-1])
        save_png(arrange(batch["image"][number : number + 1], 1), out / f"image-{row}.png")
    return "\n".join(map(str, files))


def colours(states: torch.Tensor) -> torch.Tensor:
    """Turn hidden states (B, N, D) into uint8 (B, 3, side, side): three main directions as colours.

    Each direction is scaled so that the middle 96 % of all patches span the range; its sign makes
    the largest weight positive.
    """
    batch, patches, _ = states.shape
    side = round(patches**0.5)
    flat = states.flatten(0, 1).double()
    flat = flat - flat.mean(0)
    _, _, directions = torch.linalg.svd(flat, full_matrices=False)
    directions = directions[:3]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    projected = flat @ (directions * largest.sign()).T  # B * N, 3
    low, high = torch.quantile(projected, projected.new_tensor([0.02, 0.98]), dim=0)
    levels = ((projected - low) / (high - low).clamp(min=1e-12)).clamp(0, 1) * 255
    return levels.round().to(torch.uint8).view(batch, side, side, 3).permute(0, 3, 1, 2).cpu()
