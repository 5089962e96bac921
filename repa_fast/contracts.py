"""Checks of arguments that come from a caller: ValueError that says what was expected and got."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from repa_fast.words import nearest


def expect_shape(op: str, name: str, tensor: torch.Tensor, expected: Sequence[int]) -> None:
    """Raise ValueError unless `tensor` has exactly the shape `expected`."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected)}"
        )


def expect_floating(op: str, name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless `tensor` holds floating-point numbers."""
    if not tensor.is_floating_point():
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, expected a floating-point dtype")


def expect_out_dtype(op: str, dtype: torch.dtype) -> None:
    """Raise ValueError unless `dtype` holds floating-point numbers."""
    if not dtype.is_floating_point:
        raise ValueError(f"{op}: out_dtype is {dtype}, expected a floating-point dtype")


def expect_tokens(op: str, name: str, tensor: torch.Tensor) -> tuple[int, int, int]:
    """Return (B, N, D) of a token tensor, or raise ValueError if it is not one."""
    if tensor.ndim != 3:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected (B, N, D)")
    expect_floating(op, name, tensor)
    return tuple(tensor.shape)


def expect_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        near = nearest(str(value), choices)
        hint = f"; did you mean {near}?" if near else ""
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}{hint}")


def looks_like_url(value: str | Path) -> bool:
    """Return whether a path is a URL, also as pathlib writes it, with one slash: s3:/bucket."""
    return re.match(r"\s*[A-Za-z][\w+.-]+:/", str(value)) is not None


def expect_path(name: str, value: str | Path) -> None:
    """Raise ValueError if `value` is a URL, or has letters that this locale cannot write."""
    if not str(value).isascii():
        try:
            str(value).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} is {str(value)!a}, which this locale has no letters for, expected a UTF-8 "
                "locale (LC_ALL=C.UTF-8) or PYTHONUTF8=1"
            ) from error
    if looks_like_url(value):
        raise ValueError(
            f"{name} is {str(value)!r}, expected a path: only datasets are read from URLs, and "
            "nothing is written to one"
        )


def expect_writable(name: str, path: Path, suffix: str = "", *, folder: bool = False) -> None:
    """Raise ValueError if no file, or `folder`, can be written at `path`; ask before the work.

    A file's name has to end in `suffix`; folders above it may be missing.
    """
    expect_path(name, path)
    if path.exists() and path.is_dir() != folder:
        kinds = ("file", "folder") if folder else ("folder", "file")
        raise ValueError(f"{name} is {path}, which is a {kinds[0]}, expected a {kinds[1]}")
    if suffix and path.suffix != suffix:
        raise ValueError(f"{name} is {path}, expected the name of a {suffix} file")
    above = next(p for p in ([path] if folder else []) + [*path.parents] if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        what = "a file" if above.is_file() else "read-only"
        raise ValueError(f"{name} is {path}, but {above} is {what}, expected a folder to write to")
