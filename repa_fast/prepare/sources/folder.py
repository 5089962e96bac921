"""A tree with one folder per class: train/n01440764/n01440764_10026.JPEG."""

import os
from collections.abc import Iterator
from pathlib import Path

from repa_fast.words import some

from .base import Classes, Files, is_dir, is_image, read_classes, scan

SPLITS = {"train", "val", "valid", "validation", "test"}


class ImageFolder(Files):
    """Labels are the positions of the sorted folder names, as in torchvision.

    Images are ordered by class, then by path below it, at any depth. Links to folders are followed;
    hidden files and files with other suffixes are passed over.

    `classes` are all of them in the order of their labels, where the tree has only some.

    Raises:
        ValueError: no class folder, one that is empty or not among `classes`, an image outside of
            them, a link that leads nowhere or round in a circle, a folder that cannot be read.
    """

    def __init__(self, root: str | Path, classes: Classes | None = None) -> None:
        folders = _class_folders(Path(root))
        names = [folder.name for folder in folders]
        self.class_names = read_classes(classes) or tuple(names)
        if unknown := sorted(set(names) - set(self.class_names)):
            expected = f"expected one of {len(self.class_names)} classes"
            raise ValueError(f"{root}: class folder {some(unknown)}, {expected}")
        label_of = {name: label for label, name in enumerate(self.class_names)}
        images, labels, empty = [], [], []
        for folder in folders:
            found = sorted(walk(folder.path, f"{folder.name}/"))
            if not found:
                empty.append(folder.name)
            images += found
            labels += [label_of[folder.name]] * len(found)
        if empty:
            raise ValueError(
                f"{root}: no image in {len(empty)} class folders, expected some: {some(empty)}"
            )
        super().__init__(Path(root), images, labels)


def _class_folders(root: Path) -> list[os.DirEntry]:
    entries = scan(root)
    folders = [entry for entry in entries if is_dir(entry)]
    loose = [entry.name for entry in entries if is_image(entry.name) and not is_dir(entry)]
    if loose:
        raise ValueError(
            f"{root}: {len(loose)} images without a class folder: {some(loose)}; expected "
            "CLASS/IMAGE, or labels for a flat folder"
        )
    if not folders:
        raise ValueError(f"{root}: no folder, expected one per class")
    names = [folder.name for folder in folders]
    if SPLITS.issuperset(names):
        expected = f"expected classes; give {root / names[0]}"
        raise ValueError(f"{root} has the splits {', '.join(names)}, {expected}")
    return folders


def walk(folder: str, prefix: str = "", above: dict | None = None) -> Iterator[str]:
    """Yield images at any depth below a folder, relative to it, each after `prefix`.

    `above` is {(device, inode): path} of the folders that led here.

    Raises:
        ValueError: a link leads back to a folder above it, or a folder cannot be read.
    """
    entries, status, above = scan(folder), os.stat(folder), above or {}
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise ValueError(f"{folder}: is a link back to {above[identity]}, expected no circle")
    above = above | {identity: folder}
    for entry in entries:
        if is_dir(entry):
            yield from walk(entry.path, f"{prefix}{entry.name}/", above)
        elif is_image(entry.name):
            if not entry.is_file():
                raise ValueError(f"{entry.path}: is neither a file nor a folder")
            yield f"{prefix}{entry.name}"
