"""What attention can run on: torch's kernels and, where they are installed, other packages'."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, current_flash_attention_impl, sdpa_kernel

from repa_fast.backend.dispatch import constant_when_compiled

from .reference import attention_reference

_HALF = (torch.bfloat16, torch.float16)
_ALL = (torch.float32, torch.float64, *_HALF)

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    name: what it is asked for by.
    run: (q, k, v, scale) -> out, all (B, H, N, K), last axis contiguous, K a multiple of
        `multiple`; autograd runs through it.
    probe: None, or one line that says why it cannot run in this process.
    takes: dtypes per type of device; None takes any device and dtype.
    multiple: head dims are padded with zeros to a multiple of this.
    """

    name: str
    run: Run
    probe: Callable[[], str | None] = lambda: None
    takes: Mapping[str, tuple[torch.dtype, ...]] | None = None
    multiple: int = 1


def apply(backend: Backend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Run attention on `backend`: q, k, v (B, H, N, K) with any strides -> (B, H, N, K).

    Zeros appended to the head dim change neither q k^T nor the columns of the result that are
    kept, and their gradients are cut off; the scale stays that of the true head dim.
    """
    head_dim = q.shape[-1]
    scale = head_dim**-0.5
    if not q.numel():
        return attention_reference(q, k, v, scale)  # kernels reject empty grids
    q, k, v = (_padded(x, backend.multiple) for x in (q, k, v))
    out = backend.run(q, k, v, scale)
    return out if out.shape[-1] == head_dim else out[..., :head_dim]


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


def _probe_xformers() -> str | None:
    reason = _probe_package("xformers.ops.fmha", *_XFORMERS_FUNCTIONS)
    if reason or importlib.util.find_spec("xformers._cpp_lib") is None:
        return reason
    # Without its binary xformers imports, with a warning, and raises at the first call.
    failure = importlib.import_module("xformers._cpp_lib")._cpp_library_load_exception
    return (
        None if failure is None else f"its binary does not load: {' '.join(str(failure).split())}"
    )


def _fa2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    from flash_attn.flash_attn_interface import flash_attn_func

    return _flash(flash_attn_func, q, k, v, scale)


def _fa3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    from flash_attn_interface import flash_attn_func

    return _flash(flash_attn_func, q, k, v, scale)


def _flash(
    function: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    deterministic = torch.are_deterministic_algorithms_enabled()
    out = function(*_swapped(q, k, v), softmax_scale=scale, deterministic=deterministic)
    if isinstance(out, tuple):  # earlier versions of FA3 return the log-sum-exp as well
        out = out[0]
    return out.transpose(1, 2)


def _fa4_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    out, lse, *_ = _flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=True)
    return out, lse


def _fa4_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    deterministic = torch.are_deterministic_algorithms_enabled()
    return _flash_attn_bwd(
        q, k, v, out, grad, lse, softmax_scale=scale, deterministic=deterministic
    )


_XFORMERS_FUNCTIONS = (
    "memory_efficient_attention_forward_requires_grad",
    "memory_efficient_attention_backward",
)


def _xformers_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from xformers.ops.fmha import memory_efficient_attention_forward_requires_grad

    out, lse = memory_efficient_attention_forward_requires_grad(q, k, v, scale=scale)
    return out, lse[..., : q.shape[1]]  # some kernels pad the tokens of lse


def _xformers_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from xformers.ops.fmha import memory_efficient_attention_backward

    return memory_efficient_attention_backward(grad, out, lse, q, k, v, scale=scale)


# Packages that torch.compile cannot trace run inside one custom op. Their tensors are
# (B, N, H, K), the log-sum-exp (B, H, N) in fp32.

_OPAQUE = {
    "fa4": (_fa4_forward, _fa4_backward),
    "xformers": (_xformers_forward, _xformers_backward),
}


@torch.library.custom_op("repa_fast::attention", mutates_args=())
def _opaque(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, package: str
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _OPAQUE[package][0](q, k, v, scale)
    return out.contiguous(), lse.contiguous()


@_opaque.register_fake
def _(q, k, v, scale, package):
    batch, tokens, heads, _ = q.shape
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    return torch.empty(v.shape, dtype=v.dtype, device=v.device), lse


@torch.library.custom_op("repa_fast::attention_backward", mutates_args=())
def _opaque_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    package: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = _OPAQUE[package][1](grad, q, k, v, out, lse, scale)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_opaque_backward.register_fake
def _(grad, q, k, v, out, lse, scale, package):
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


def _save(ctx, inputs, output) -> None:
    q, k, v, ctx.scale, ctx.package = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx, grad, _grad_lse):
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    return *_opaque_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.package), None, None


_opaque.register_autograd(_differentiate, setup_context=_save)


def _run_opaque(
    package: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    return _opaque(*_swapped(q, k, v), scale, package)[0].transpose(1, 2)


_TABLE = (
    Backend("sdpa", _sdpa),
    Backend(
        "sdpa-cudnn",
        partial(_sdpa_on, SDPBackend.CUDNN_ATTENTION),
        takes={"cuda": _HALF},
        multiple=8,
    ),
    Backend(
        "sdpa-flash",
        partial(_sdpa_on, SDPBackend.FLASH_ATTENTION),
        _probe_flash,
        {"cuda": _HALF, "cpu": _ALL},
    ),
    Backend(
        "sdpa-efficient",
        partial(_sdpa_on, SDPBackend.EFFICIENT_ATTENTION),
        takes={"cuda": (torch.float32, *_HALF)},
        multiple=8,
    ),
    Backend("math", partial(_sdpa_on, SDPBackend.MATH)),
    Backend("reference", attention_reference),
    Backend(
        "fa2",
        _fa2,
        partial(_probe_package, "flash_attn.flash_attn_interface", "flash_attn_func"),
        {"cuda": _HALF},
        multiple=8,
    ),
    Backend(
        "fa3",
        _fa3,
        partial(_probe_package, "flash_attn_interface", "flash_attn_func"),
        {"cuda": _HALF},
        multiple=8,
    ),
    # 4.0.0b36 computes a wrong dq on Hopper at head dims like 72 that its forward and backward
    # round up differently; multiples of 32 are what its own tests cover.
    Backend(
        "fa4",
        partial(_run_opaque, "fa4"),
        partial(_probe_package, "flash_attn.cute.interface", "_flash_attn_fwd", "_flash_attn_bwd"),
        {"cuda": _HALF},
        multiple=32,
    ),
    Backend(
        "xformers",
        partial(_run_opaque, "xformers"),
        _probe_xformers,
        {"cuda": (torch.float32, *_HALF)},
        multiple=8,
    ),
)
BACKENDS: Mapping[str, Backend] = {backend.name: backend for backend in _TABLE}
