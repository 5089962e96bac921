"""Checks of arguments that come from a caller: ValueError that says what was expected and got."""

from collections.abc import Sequence

import torch


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
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
