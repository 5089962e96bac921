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
        path, kind = _recognise(path, labels)
    if kind == "flat":
        if labels is None and not (path / DATASET_JSON).is_file():
            raise ValueError(f"{path}: no labels given and no {DATASET_JSON} in it, expected one")
        return FlatFolder(path, labels or path / DATASET_JSON, classes)
    if labels is not None:
        given = f"labels are given for {path} of kind {kind}"
        raise ValueError(f"{given}, expected them for a flat folder")
    opens = {"imagefolder": ImageFolder, "huggingface": HuggingFaceDataset}
    return opens.get(kind, WebDataset)(path, classes)


def _recognise(path: Path, labels: str | Path | None) -> tuple[Path, str]:
    """Return the folder or files to open, and their kind."""
    if not path.is_dir():
        files = [path] if path.exists() else sorted(path.parent.glob(path.name))
        if not files:
            raise ValueError(f"{path} does not exist. {_looked_for(path)}")
        if kind := _kind_of([files[0].name]):
            return path, kind
        raise ValueError(f"{files[0]}: no source of images. {_looked_for(path)}")
    if labels is not None or (path / DATASET_JSON).is_file():
        return path, "flat"
    if (path / "dataset_dict.json").is_file():
        splits = [entry.name for entry in scan(path) if is_dir(entry)]
        raise ValueError(f"{path} has the splits {', '.join(splits)}, expected one: {path}/...")
    for folder in (path, path / "data"):
        entries = scan(folder) if folder.is_dir() else []
        if kind := _kind_of([entry.name for entry in entries]):
            return folder, kind
    entries = scan(path)
    if any(is_dir(entry) for entry in entries):
        return path, "imagefolder"
    if any(is_image(entry.name) for entry in entries):
        raise ValueError(
            f"{path} has images and no class folders, expected their labels in a file as well"
        )
    raise ValueError(f"{path}: no source of images. {_looked_for(path)}")


def _kind_of(names: list[str]) -> str:
    for kind, module in (("huggingface", huggingface), ("webdataset", webdataset)):
        if any(name.endswith(module.SUFFIXES) for name in names):
            return kind
    return ""


def _looked_for(path: Path) -> str:
    return (
        f"Looked for class folders {path}/CLASS/IMAGE, for {DATASET_JSON} or labels of a flat "
        f"folder, and for .parquet, .arrow and .tar files in {path} and {path}/data"
    )
