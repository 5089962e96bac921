"""Files, noise and tars for sources of images."""

import io
import tarfile
from pathlib import Path

import numpy as np


def write(path: Path, data: bytes | str = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def tree(root: Path) -> Path:
    """dog/a.jpg, cat/b/c.jpg."""
    write(root / "dog" / "a.jpg", b"x")
    write(root / "cat" / "b" / "c.jpg", b"x")
    return root


def rgb(height: int = 16, width: int = 16, seed: int = 0) -> np.ndarray:
    """uint8 (height, width, 3): noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
