"""A dataset by its path, whatever it is."""

from pathlib import Path

from repa_fast.data.dataset import LatentDataset
from repa_fast.data.official import OfficialFolder
from repa_fast.data.store import is_url

Dataset = LatentDataset | OfficialFolder


def open_dataset(path: str | Path, split: str = "train") -> Dataset:
    """An official folder if it has vae-sd/, else a Lance table or a folder of tables, at a URL too.

    Raises:
        ValueError: it is none of these, or does not hold together.
    """
    if not is_url(path) and (Path(path) / "vae-sd").is_dir():
        return OfficialFolder(path)
    return LatentDataset(path, split)
