"""Contract of attention, and the backend this process runs it on."""

import contextlib
from collections.abc import Iterator

import torch

from repa_fast.backend.dispatch import constant_when_compiled
from repa_fast.contracts import expect_choice, expect_floating, expect_shape

from .backends import BACKENDS, Backend, apply, apply_packed, expect_runnable

_backend = "sdpa"


def set_backend(name: str) -> None:
    """Run attention on `name` wherever a call does not say otherwise.

    Blocks that are compiled already compile again at their next call.

    Raises:
        ValueError: not one of BACKENDS.
        RuntimeError: its package is absent or broken, with the reason.
    """
    global _backend
    expect_choice("attention: backend", name, tuple(BACKENDS))
    reason = BACKENDS[name].probe()
    if reason:
        raise RuntimeError(f"attention: backend {name!r} cannot run: {reason}")
    _backend = name


def current_backend() -> str:
    """Return the backend of calls that name none."""
    return _backend


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Set a backend for a while: for another dtype than the one a run has chosen its backend for.

    Raises:
        ValueError, RuntimeError: as for `set_backend`.
    """
    global _backend
    before = _backend
    set_backend(name)
    try:
        yield
    finally:
        _backend = before


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """Compute softmax(q k^T / sqrt(K)) v of every head (arXiv 1706.03762, eq. 1), without a mask.

    Autocast does not reach inside: what is computed follows from the dtype of the arguments.

    Args:
        q: (B, H, N, K) with K at least 1, any floating dtype its backend takes, any strides.
        k: like q, in its dtype and on its device.
        v: likewise.
        backend: one of BACKENDS; None takes the one of `set_backend`, at first "sdpa".

    Returns:
        (B, H, N, K) in the dtype of v; its strides are the backend's.

    Raises:
        ValueError: a shape, dtype or device that does not fit, with expected and got; a backend
            that is unknown or does not take this device or dtype.
        RuntimeError: a backend whose package is absent or broken, with the reason. Nothing falls
            back to another backend.
    """
    _expect_arguments(q, k, v)
    chosen = _runnable(backend, q)
    with _without_autocast(q.device.type):
        return apply(chosen, q, k, v)


def attention_packed(qkv: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """Compute `attention` of q, k and v in one tensor, as one linear layer gives them.

    A backend that packs returns the gradient in one tensor as well; of others autograd stacks it.

    Args:
        qkv: (B, N, 3, H, K) with K at least 1, any floating dtype its backend takes, any strides.
        backend: as for `attention`.

    Returns:
        (B, N, H, K) in the dtype of qkv; its strides are the backend's.

    Raises:
        ValueError, RuntimeError: as for `attention`.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3 or not qkv.shape[-1]:
        shape = tuple(qkv.shape)
        raise ValueError(
            f"attention: qkv has shape {shape}, expected (B, N, 3, H, K) with K at least 1"
        )
    expect_floating("attention", "qkv", qkv)
    chosen = _runnable(backend, qkv)
    with _without_autocast(qkv.device.type):
        return apply_packed(chosen, qkv)


def _runnable(backend: str | None, tensor: torch.Tensor) -> Backend:
    name = _backend if backend is None else backend
    expect_choice("attention: backend", name, tuple(BACKENDS))
    expect_runnable(name, tensor.device.type, tensor.dtype)
    return BACKENDS[name]


def _expect_arguments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.ndim != 4 or not q.shape[-1]:
        raise ValueError(
            f"attention: q has shape {tuple(q.shape)}, expected (B, H, N, K) with K at least 1"
        )
    expect_floating("attention", "q", q)
    for name, tensor in (("k", k), ("v", v)):
        expect_shape("attention", name, tensor, q.shape)
        if tensor.dtype != q.dtype:
            raise ValueError(f"attention: {name} has dtype {tensor.dtype}, expected {q.dtype} as q")
        if tensor.device != q.device:
            raise ValueError(f"attention: {name} is on {tensor.device}, expected {q.device} as q")


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    if _has_autocast(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


@constant_when_compiled
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)  # not traceable in torch 2.11
