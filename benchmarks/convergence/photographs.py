"""Crops of four photographs as class folders: `python -m benchmarks.convergence.photographs OUT`.

OUT/train has 21 crops of each (84), OUT/val 8 of each, of parts of the photographs that no crop of
train has seen. The photographs are those that scikit-image and scikit-learn bring: no download.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

CROPS = {"train": 21, "val": 8}
SEEN = 0.68
"""Share of a photograph's width, from the left, that crops of train are taken from."""
SIDES = 0.55, 0.9
"""Of a crop, in shares of the smaller side of its part of the photograph."""


def photographs() -> dict[str, np.ndarray]:
    """Return the photographs by class, uint8 (H, W, 3)."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    return {
        "cat": data.chelsea(),
        "coffee": data.coffee(),
        "flower": load_sample_image("flower.jpg"),
        "temple": load_sample_image("china.jpg"),
    }


def write_crops(out: Path, seed: int = 0) -> Path:
    """Write the crops as OUT/SPLIT/CLASS/NUMBER.png, a function of the seed; return `out`."""
    rng = np.random.default_rng(seed)
    for name, picture in photographs().items():
        cut = round(SEEN * picture.shape[1])
        for split, part in (("train", picture[:, :cut]), ("val", picture[:, cut:])):
            folder = out / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(CROPS[split]):
                side = round(rng.uniform(*SIDES) * min(part.shape[:2]))
                top, left = (rng.integers(size - side + 1) for size in part.shape[:2])
                crop = part[top : top + side, left : left + side]
                Image.fromarray(crop).save(folder / f"{number:02d}.png")
    return out


if __name__ == "__main__":
    print(write_crops(Path(sys.argv[1])))
