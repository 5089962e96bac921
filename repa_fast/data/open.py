"""A dataset by its path, whatever it is."""

from pathlib import Path

from repa_fast.data.dataset import LatentDataset
from repa_fast.data.official import OfficialFolder

Dataset = LatentDataset | OfficialFolder


def open_dataset(path: str | Path, split: str = "train") -> Dataset:
    """An official folder if it has vae-sd/, else a Lance table or a folder of tables.

    Raises:
        ValueError: it is none of these, or does not hold together.
    """
    if (Path(str(path)) / "vae-sd").is_dir():
        return OfficialFolder(path)
    return LatentDataset(path, split)
