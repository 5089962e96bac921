"""Datasets by their path, whatever they are."""

from pathlib import Path

from repa_fast.data.dataset import LatentDataset, Metadata
from repa_fast.data.digits import digits_metadata, ensure_digits
from repa_fast.data.official import OfficialFolder
from repa_fast.data.store import is_url

Dataset = LatentDataset | OfficialFolder


def open_dataset(path: str | Path, split: str = "train") -> Dataset:
    """Open an official folder if it has vae-sd/, else a Lance table or a folder of tables.

    Args:
        path: may be the URL of a table; "digits" is the bundled dataset, written on first use.
        split: of the tables in a folder.

    Raises:
        ValueError: it is none of these, or does not hold together.
    """
    if path == "digits":
        path = ensure_digits()
    if not is_url(path) and (Path(path) / "vae-sd").is_dir():
        return OfficialFolder(path)
    return LatentDataset(path, split)


def find_metadata(path: str) -> Metadata | None:
    """Return a dataset's metadata, None where there is no dataset yet; write nothing.

    Raises:
        ValueError: as for `open_dataset`.
    """
    if path == "digits":
        return digits_metadata()
    return open_dataset(path).metadata if is_url(path) or Path(path).exists() else None
