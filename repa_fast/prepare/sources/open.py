"""Sources by their path, whatever they are."""

from pathlib import Path

from . import huggingface, webdataset
from .base import Classes, Source, is_dir, is_image, scan
from .flat import FlatFolder
from .folder import ImageFolder
from .huggingface import HuggingFaceDataset
from .webdataset import WebDataset

KINDS = ("auto", "imagefolder", "flat", "huggingface", "webdataset")
DATASET_JSON = "dataset.json"


def open_source(
    path: str | Path,
    kind: str = "auto",
    labels: str | Path | None = None,
    classes: Classes | None = None,
) -> Source:
    """Open images with labels.

    Args:
        path: a folder of class folders; a flat folder (with `labels`, or with dataset.json); a
            folder, file or pattern (DIR/train-*) of .parquet, .arrow or .tar files.
        kind: one of `KINDS`; "auto" looks.
        labels: of a flat folder, see FlatFolder.
        classes: the classes in the order of their labels (names, a text file, or a folder of
            class folders): needed for labels that are names, and where some classes are absent.

    Raises:
        ValueError: it is none of these, or does not hold together; says what.
    """
    path = Path(path)
    if kind not in KINDS:
        raise ValueError(f"source kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if kind == "auto":
        path, kind = recognise(path, labels)
    if kind == "flat":
        if labels is None and not (path / DATASET_JSON).is_file():
            raise ValueError(f"{path}: no labels given and no {DATASET_JSON} in it, expected one")
        return FlatFolder(path, labels or path / DATASET_JSON, classes)
    if labels is not None:
        raise ValueError(
            f"labels are given for {path} of kind {kind}, expected them for a flat folder"
        )
    if kind == "imagefolder":
        return ImageFolder(path, classes)
    if kind == "huggingface":
        return HuggingFaceDataset(path, classes)
    return WebDataset(path, classes)


def recognise(path: Path, labels: str | Path | None = None) -> tuple[Path, str]:
    """Return the folder or files to open, and their kind.

    Raises:
        ValueError: nothing that was looked for is there.
    """
    if not path.is_dir():
        return path, _kind_of_files(path)
    if labels is not None or (path / DATASET_JSON).is_file():
        return path, "flat"
    if (path / "dataset_dict.json").is_file():
        splits = [entry.name for entry in scan(path) if is_dir(entry)]
        raise ValueError(f"{path} has the splits {', '.join(splits)}, expected one: {path}/...")
    for folder in (path, path / "data"):
        entries = scan(folder) if folder.is_dir() else []
        if any(entry.name.endswith(huggingface.SUFFIXES) for entry in entries):
            return folder, "huggingface"
        if any(entry.name.endswith(webdataset.SUFFIXES) for entry in entries):
            return folder, "webdataset"
    entries = scan(path)
    if any(is_dir(entry) for entry in entries):
        return path, "imagefolder"
    if any(is_image(entry.name) for entry in entries):
        raise ValueError(
            f"{path} has images and no class folders, expected their labels in a file as well"
        )
    raise ValueError(f"{path}: no source of images. {_looked_for(path)}")


def _kind_of_files(path: Path) -> str:
    files = [path] if path.exists() else sorted(path.parent.glob(path.name))
    if not files:
        raise ValueError(f"{path} does not exist. {_looked_for(path)}")
    name = files[0].name
    if name.endswith(huggingface.SUFFIXES):
        return "huggingface"
    if name.endswith(webdataset.SUFFIXES):
        return "webdataset"
    raise ValueError(f"{files[0]}: no source of images. {_looked_for(path)}")


def _looked_for(path: Path) -> str:
    return (
        f"Looked for class folders {path}/CLASS/IMAGE, for {DATASET_JSON} or labels of a flat "
        f"folder, and for .parquet, .arrow and .tar files in {path} and {path}/data"
    )
