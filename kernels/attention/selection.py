"""Which backend attention runs on: those whose gradients are right, and of these the fastest."""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from repa_fast.contracts import expect_choice

from .backends import BACKENDS, Backend, apply_packed, describe, why_not

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # fp64 is the oracle's
_TENSORS = ("out", "dq", "dk", "dv")
_TRIAL_BATCH = 2
_WARM_UP, _ROUNDS, _CALLS = 3, 5, 5
_HEAD_START = 10_000_000  # clock cycles, about 5 ms

Tensors = tuple[torch.Tensor, torch.Tensor]  # qkv (B, N, 3, H, K), dout (B, N, H, K)
Clock = Callable[[Backend, Tensors], float]


@dataclass(frozen=True)
class Row:
    """What became of one backend.

    worst: which of out, dq, dk, dv came closest to the bound of its error, or went beyond.
    error, bound: root mean square of that error and its bound, None where it did not run.
    ms: forward and backward to the gradient of qkv, in milliseconds, None where it was not timed.
    left_out: why it is not eligible, "" where it is.
    """

    backend: str
    worst: str = ""
    error: float | None = None
    bound: float | None = None
    ms: float | None = None
    left_out: str = ""


@dataclass(frozen=True)
class Selection:
    """The chosen backend, one line that says why, and a row per backend that was looked at."""

    backend: str
    reason: str
    rows: tuple[Row, ...]


def select(
    asked: str,
    *,
    heads: int,
    tokens: int,
    head_dim: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device | str,
    backends: Mapping[str, Backend] = BACKENDS,
) -> Selection:
    """Choose the backend of a model; `set_backend(selection.backend)` then makes it the default.

    A backend that is asked for by name is self-tested and taken, or raises. "auto" on CUDA
    self-tests every proven backend that can run, times those that pass, forward and backward at the
    real batch, and takes the fastest; elsewhere it takes "sdpa" as it is. Timings differ between
    processes: in a distributed run one process selects and tells the others.

    Args:
        asked: "auto" or a name in `backends`.
        heads: H of the model.
        tokens: N.
        head_dim: K.
        batch: B per process, for the timing; the self-test takes 2.
        dtype: what q, k and v are in, under autocast its dtype.
        device: where they are.
        backends: the table to choose from.

    Raises:
        ValueError: `asked` is unknown or does not take this device or dtype; a self-test in
            another dtype than fp32, bf16 or fp16.
        RuntimeError: `asked` is not installed, broken, raises, or has errors above its bound, with
            the reason or the numbers; under "auto", no backend is left.
    """
    expect_choice("attention: backend", asked, ("auto", *backends))
    device = torch.device(device)
    shape = (batch, heads, tokens, head_dim)
    if asked != "auto":
        mismatch = why_not(backends[asked], device.type, dtype)
        if mismatch:
            raise ValueError(f"attention: backend {asked!r} cannot run: {mismatch}")
        (row,) = survey([backends[asked]], shape, dtype, device)
        if row.left_out:
            raise RuntimeError(f"attention: backend {asked!r} cannot run: {row.left_out}")
        reason = f"asked for; error of {row.worst} {row.error:.1e}, at most {row.bound:.1e}"
        return Selection(asked, reason, (row,))
    if device.type != "cuda":
        return Selection("sdpa", f"auto: on {device.type} torch chooses the kernel", ())
    proven = [backend for backend in backends.values() if not backend.unproven]
    rows = survey(proven, shape, dtype, device, clock=milliseconds)
    unproven = (Row(b.name, left_out=b.unproven) for b in backends.values() if b.unproven)
    return fastest((*rows, *unproven), f"{shape} {dtype}")


def survey(
    backends: list[Backend],
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    clock: Clock | None = None,
) -> tuple[Row, ...]:
    """Return a row per backend at `shape` (B, H, N, K); `clock`, if any, times those that pass."""
    if dtype not in _DTYPES:
        expected = ", ".join(str(d) for d in _DTYPES)
        raise ValueError(f"attention: the self-test got dtype {dtype}, expected one of {expected}")
    _, *rest = shape
    trial = _as_in_the_model((_TRIAL_BATCH, *rest), dtype, device)
    qkv, dout = trial
    unpacked = (*_unpacked(qkv), dout.transpose(1, 2))
    oracle = closed_form(*unpacked, work=torch.float64, stored=torch.float64)
    working = closed_form(*unpacked, work=torch.promote_types(dtype, torch.float32), stored=dtype)
    rows = [_self_test(backend, trial, oracle, working) for backend in backends]
    del trial, qkv, dout, unpacked, oracle, working
    if clock is None:
        return tuple(rows)
    inputs = _as_in_the_model(shape, dtype, device)
    timed = [
        row if row.left_out else _timed(row, backend, inputs, clock)
        for row, backend in zip(rows, backends)
    ]
    return tuple(timed)


def fastest(rows: tuple[Row, ...], where: str) -> Selection:
    """Select the row with the least ms among those that are not left out.

    Raises:
        RuntimeError: every row is left out, with all reasons.
    """
    eligible = [row for row in rows if not row.left_out]
    if not eligible:
        reasons = "; ".join(f"{row.backend}: {row.left_out}" for row in rows)
        raise RuntimeError(f"attention: no backend can run at {where}: {reasons}")
    best = min(eligible, key=lambda row: row.ms)
    reason = (
        f"auto: {best.ms:.3f} ms forward and backward at {where}, "
        f"the fastest of {len(eligible)} with right gradients"
    )
    return Selection(best.backend, reason, rows)


def closed_form(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    *,
    work: torch.dtype,
    stored: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """Compute output, dq, dk and dv by the explicit formulas, (B, H, N, K) in `stored`.

    Sums are in `work`; what enters a later matmul (P, dS, the output) is rounded to `stored`
    first, where a kernel on tensor cores has to round as well.
    """

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.to(stored).to(work)

    q, k, v, dout = (x.detach().to(work) for x in (q, k, v, dout))
    scale = q.shape[-1] ** -0.5
    scores = scale * (q @ k.mT)
    out = rounded(rounded(scores.softmax(dim=-1)) @ v)
    p = (scores - scores.logsumexp(dim=-1, keepdim=True)).exp()
    dv = rounded(p).mT @ dout
    ds = rounded(p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)))
    return tuple(x.to(stored) for x in (out, scale * (ds @ k), scale * (ds.mT @ q), dv))


def error_and_bound(
    actual: torch.Tensor, oracle: torch.Tensor, working: torch.Tensor
) -> tuple[float, float]:
    """Return the RMS of the error of `actual`, and its bound 2 * error(working) + band.

    All have one shape; the oracle is fp64, `working` the same maths in the dtype of `actual`. The
    band is what rounding the oracle once to that dtype can cost: finfo.eps / 2 * max(|oracle|,
    finfo.tiny) per element. The mean runs over all elements. The maximum has no stable bound:
    where one probability dominates a sum, the accuracy of exp and the order of summation decide,
    and torch's CPU kernel in fp32 is above twice the maximum of the explicit formula.
    """
    info = torch.finfo(working.dtype)
    error, allowed, band = (
        values.square().mean().sqrt().item()
        for values in (
            actual.detach().double() - oracle,
            working.double() - oracle,
            info.eps / 2 * oracle.abs().clamp_min(info.tiny),
        )
    )
    return error, 2 * allowed + band


def milliseconds(backend: Backend, inputs: Tensors) -> float:
    """Return the median time of a forward and a backward on the CUDA device of `inputs`."""
    with torch.cuda.device(inputs[0].device):
        for _ in range(_WARM_UP):
            _forward_and_backward(backend, *inputs)
        events = []
        for _ in range(_ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(_HEAD_START)  # the device waits while the host enqueues the calls
            start.record()
            for _ in range(_CALLS):
                _forward_and_backward(backend, *inputs)
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / _CALLS


def _self_test(
    backend: Backend,
    trial: Tensors,
    oracle: tuple[torch.Tensor, ...],
    working: tuple[torch.Tensor, ...],
) -> Row:
    reason = why_not(backend, trial[0].device.type, trial[0].dtype) or backend.probe()
    if reason:
        return Row(backend.name, left_out=reason)
    try:
        out, dqkv = _forward_and_backward(backend, *trial)
        got = (out.transpose(1, 2), *_unpacked(dqkv))
    except Exception as error:  # kernels of other packages raise anything
        return Row(backend.name, left_out=describe(error))
    for name, g, w in zip(_TENSORS, got, working):
        if g.dtype != w.dtype:
            return Row(backend.name, left_out=f"{name} is {g.dtype}, expected {w.dtype}")
    found = [
        (name, *error_and_bound(*tensors)) for name, *tensors in zip(_TENSORS, got, oracle, working)
    ]
    worst, error, bound = max(found, key=_excess)
    left_out = ""
    if not error <= bound < math.inf:  # so that NaN does not pass
        left_out = f"error of {worst} is {error:.3e}, expected at most {bound:.3e}"
    return Row(backend.name, worst, error, bound, left_out=left_out)


def _timed(row: Row, backend: Backend, inputs: Tensors, clock: Clock) -> Row:
    try:
        return replace(row, ms=clock(backend, inputs))
    except torch.OutOfMemoryError:
        return replace(row, left_out=f"out of memory at {tuple(inputs[0].shape)}")
    finally:
        if inputs[0].is_cuda:
            torch.cuda.empty_cache()


def _forward_and_backward(
    backend: Backend, qkv: torch.Tensor, dout: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and dqkv of `backend`, whatever autocast and grad mode are around."""
    with torch.enable_grad(), torch.autocast(qkv.device.type, enabled=False):
        leaf = qkv.detach().requires_grad_()
        out = apply_packed(backend, leaf)
        return out.detach(), *torch.autograd.grad(out, leaf, dout)


def _as_in_the_model(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Tensors:
    """Draw a seeded qkv and dout for `shape` (B, H, N, K)."""
    batch, heads, tokens, head_dim = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*axes: int) -> torch.Tensor:
        size = (batch, tokens, *axes, heads, head_dim)
        return torch.randn(size, generator=generator, device=device).to(dtype)

    return normal(3), normal()


def _unpacked(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return views (B, H, N, K) of q, k and v, or of their gradients."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def _excess(entry: tuple[str, float, float]) -> float:
    """Return how far an error went towards its bound; NaN counts as infinitely far."""
    _, error, bound = entry
    ratio = error / bound if bound else math.inf
    return math.inf if math.isnan(ratio) else ratio
