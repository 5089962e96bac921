"""What attention can run on: torch's kernels and, where they are installed, other packages'."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, current_flash_attention_impl, sdpa_kernel

from repa_fast.backend.dispatch import constant_when_compiled

from . import packed
from .reference import attention_reference

_HALF = (torch.bfloat16, torch.float16)
_ALL = (torch.float32, torch.float64, *_HALF)
_CUDA, _CUDA_HALF = {"cuda": (torch.float32, *_HALF)}, {"cuda": _HALF}
_PACKS_HALF: dict[str, Any] = {"takes": _CUDA_HALF, "multiple": 8, "packs": True}
_FA2 = ("flash_attn.flash_attn_interface", "flash_attn_qkvpacked_func")
_FA3 = ("flash_attn_interface", "flash_attn_qkvpacked_func")


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    name: what it is asked for by.
    run: (q, k, v, scale) -> out, all (B, H, N, K), or, where it packs, (qkv, scale) -> out, qkv
        (B, N, 3, H, K) and out (B, N, H, K); last axis contiguous, K a multiple of `multiple`;
        autograd runs through it.
    probe: None, or one line that says why it cannot run in this process.
    takes: dtypes per type of device; None takes any device and dtype.
    multiple: head dims are padded with zeros to a multiple of this.
    packs: its backward pass writes dq, dk and dv into one tensor; of others autograd stacks them.
    unproven: why "auto" does not take it yet, or "".
    """

    name: str
    run: Callable[..., torch.Tensor]
    probe: Callable[[], str | None] = lambda: None
    takes: Mapping[str, tuple[torch.dtype, ...]] | None = None
    multiple: int = 1
    packs: bool = False
    unproven: str = ""


def apply(backend: Backend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Run attention on `backend`: q, k, v (B, H, N, K) with any strides -> (B, H, N, K).

    Zeros appended to the head dim change neither q k^T nor the columns of the result that are
    kept, and their gradients are cut off; the scale stays that of the true head dim.
    """
    head_dim = q.shape[-1]
    scale = head_dim**-0.5
    if not q.numel():
        return attention_reference(q, k, v, scale)  # kernels reject empty grids
    if backend.packs:
        return apply_packed(backend, torch.stack(_swapped(q, k, v), dim=2)).transpose(1, 2)
    q, k, v = (_padded(x, backend.multiple) for x in (q, k, v))
    return _cut(backend.run(q, k, v, scale), head_dim)


def apply_packed(backend: Backend, qkv: torch.Tensor) -> torch.Tensor:
    """Run attention on `backend`: qkv (B, N, 3, H, K) with any strides -> (B, N, H, K)."""
    if not backend.packs or not qkv.numel():
        return apply(backend, *qkv.permute(2, 0, 3, 1, 4).unbind(0)).transpose(1, 2)
    head_dim = qkv.shape[-1]
    return _cut(backend.run(_padded(qkv, backend.multiple), head_dim**-0.5), head_dim)


def why_not(backend: Backend, device: str, dtype: torch.dtype) -> str | None:
    """Return why `backend` takes no tensors of this dtype on this type of device, or None."""
    if backend.takes is None:
        return None
    if device not in backend.takes:
        return f"it runs on {' and '.join(backend.takes)}, got tensors on {device}"
    if dtype not in backend.takes[device]:
        expected = ", ".join(str(d) for d in backend.takes[device])
        return f"on {device} it takes {expected}, got {dtype}"
    return None


@constant_when_compiled
def expect_runnable(name: str, device: str, dtype: torch.dtype) -> None:
    """Raise ValueError for a device or dtype, RuntimeError for a package, that does not fit."""
    reason = why_not(BACKENDS[name], device, dtype)
    if reason:
        raise ValueError(f"attention: backend {name!r} cannot run: {reason}")
    reason = BACKENDS[name].probe()
    if reason:
        raise RuntimeError(f"attention: backend {name!r} cannot run: {reason}")


def describe(error: BaseException) -> str:
    """Return type and first line of the message of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _padded(x: torch.Tensor, multiple: int) -> torch.Tensor:
    missing = -x.shape[-1] % multiple
    if missing:
        return F.pad(x, (0, missing))
    return x if x.stride(-1) == 1 else x.contiguous()


def _cut(out: torch.Tensor, head_dim: int) -> torch.Tensor:
    return out if out.shape[-1] == head_dim else out[..., :head_dim]


def _swapped(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Swap (B, H, N, K) and (B, N, H, K), as views."""
    return tuple(x.transpose(1, 2) for x in tensors)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _sdpa_on(
    kernel: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    with sdpa_kernel(kernel):
        return _sdpa(q, k, v, scale)


def _probe_flash() -> str | None:
    replaced = current_flash_attention_impl()
    if replaced is None:
        return None
    return f"torch runs {replaced} in its place since activate_flash_attention_impl({replaced!r})"


def _probe_package(module: str, *names: str) -> str | None:
    try:
        package = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            return "not installed"
        return f"{module} does not import: {describe(error)}"
    except Exception as error:  # a broken binary package raises anything
        return f"{module} does not import: {describe(error)}"
    missing = [name for name in names if not hasattr(package, name)]
    return f"{module} has no {', '.join(missing)}" if missing else None


def _xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*_swapped(q, k, v), scale=scale).transpose(1, 2)


def _fa2(qkv: torch.Tensor, scale: float) -> torch.Tensor:
    from flash_attn.flash_attn_interface import flash_attn_qkvpacked_func

    return _flash(flash_attn_qkvpacked_func, qkv, scale)


def _fa3(qkv: torch.Tensor, scale: float) -> torch.Tensor:
    from flash_attn_interface import flash_attn_qkvpacked_func

    return _flash(flash_attn_qkvpacked_func, qkv, scale)


def _flash(function: Callable, qkv: torch.Tensor, scale: float) -> torch.Tensor:
    deterministic = torch.are_deterministic_algorithms_enabled()
    out = function(qkv, softmax_scale=scale, deterministic=deterministic)
    # earlier versions of FA3 return the log-sum-exp as well
    return out[0] if isinstance(out, tuple) else out


_TABLE = (
    Backend("sdpa", _sdpa),
    Backend(
        "sdpa-cudnn", partial(_sdpa_on, SDPBackend.CUDNN_ATTENTION), takes=_CUDA_HALF, multiple=8
    ),
    Backend(
        "sdpa-flash",
        partial(_sdpa_on, SDPBackend.FLASH_ATTENTION),
        _probe_flash,
        {**_CUDA_HALF, "cpu": _ALL},
    ),
    Backend(
        "sdpa-efficient", partial(_sdpa_on, SDPBackend.EFFICIENT_ATTENTION), takes=_CUDA, multiple=8
    ),
    Backend("math", partial(_sdpa_on, SDPBackend.MATH)),
    Backend("reference", attention_reference),
    Backend("efficient", partial(packed.run, "efficient"), takes=_CUDA, multiple=8, packs=True),
    Backend(
        "cudnn",
        partial(packed.run, "cudnn"),
        partial(_probe_package, "cudnn", "pygraph"),
        **_PACKS_HALF,
        unproven="no GPU has measured it yet",
    ),
    Backend("fa2", _fa2, partial(_probe_package, *_FA2), **_PACKS_HALF),
    Backend("fa3", _fa3, partial(_probe_package, *_FA3), **_PACKS_HALF),
    Backend(
        "xformers",
        _xformers,
        partial(_probe_package, "xformers.ops", "memory_efficient_attention"),
        _CUDA,
        multiple=8,
    ),
)
BACKENDS: Mapping[str, Backend] = {backend.name: backend for backend in _TABLE}
