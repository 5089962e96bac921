"""Time of one call of something short, on a GPU with cold caches or on a CPU.

On a GPU a call takes 10 to 1000 us. Several sets of inputs take turns, so that what a call reads
has left the L2 cache since it was last used; many calls are captured in one CUDA graph, so that the
host does not limit them; the graph is replayed between two events, several times.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

L2_TURNOVER = 3  # bytes touched between two uses of the same byte, in sizes of the L2 cache
MIN_L2 = 50 * 2**20  # bytes
MOST_CALLS = 2000  # in one graph
MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}

Call = Callable[[], Any]


@dataclass(frozen=True)
class Effort:
    """How long a figure is measured.

    Attributes:
        graph_ms: least work between two readings of the clock.
        rounds: readings.
        warmup: rounds before the first reading, and at least
        warmup_seconds: of them, on a GPU.
    """

    graph_ms: float = 2.0
    rounds: int = 20
    warmup: int = 5
    warmup_seconds: float = 0.2


QUICK = Effort(rounds=7, warmup=2)
ON_CPU = Effort(graph_ms=1.0, rounds=5, warmup=1)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: percentiles over rounds of the mean over a round's calls.

    method: "cuda graph", "events" or "perf_counter"; after "events", why no graph was captured.
    """

    p20: float
    p50: float
    p80: float
    calls: int
    rounds: int
    method: str


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th, interpolated; of one sample, itself."""
    if len(samples) < 2:
        return (samples[0],) * 3
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return cuts[1], statistics.median(samples), cuts[7]


def sets_needed(touched: int, device: torch.device) -> int:
    """How many sets of tensors have to take turns, when a call touches `touched` bytes of one."""
    if device.type != "cuda":
        return 1
    cache = max(MIN_L2, torch.cuda.get_device_properties(device).L2_cache_size)
    return max(1, math.ceil(L2_TURNOVER * cache / max(touched, 1)))


@contextlib.contextmanager
def own_stream(device: torch.device):
    """A stream that graphs can be captured on; what is captured must have been prepared on it.

    A backward pass runs on the stream of its forward pass, so the forward pass belongs in here too.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def measure(variants: Sequence[Call], device: torch.device, effort: Effort) -> Timing:
    """Time of one call of `variants`, the same call on different inputs, which take turns.

    The results of a call are kept until all other variants have run, so that they are not written
    to the memory, still in the cache, of the call before. On a GPU, call it within `own_stream`.
    """
    if device.type != "cuda":
        return _measure_on_cpu(variants, effort)
    for _ in range(3):  # compiles, allocates, fills caches of launches
        _run(variants, len(variants))
    torch.cuda.synchronize(device)
    try:
        return _measure_graph(variants, effort)
    except Exception as error:
        torch.cuda.synchronize(device)  # raises where the device itself has failed
        while error.__context__ is not None:  # ending a broken capture raises once more
            error = error.__context__
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        timing = _measure_events(variants, effort)
        return replace(timing, method=f"events ({message})")


def copy_time(nbytes: int, device: torch.device, effort: Effort) -> Timing:
    """The yardstick: moving `nbytes`, half of them read and half written.

    On a GPU the faster of Tensor.copy_ and of torch's simplest elementwise kernel: within a CUDA
    graph the former is not a kernel but a copy engine's work (2.7 TB/s on an H200 that moves 4.1).
    """
    half = max(1, nbytes // 8)
    pairs = [
        [torch.randn(half, device=device) for _ in range(2)]  # zeros move faster than data
        for _ in range(sets_needed(8 * half, device))
    ]
    movers = [torch.Tensor.copy_]
    if device.type == "cuda":
        movers.append(lambda target, source: torch.neg(source, out=target))
    found = []
    for mover in movers:
        with own_stream(device):
            found.append(measure([partial(mover, *pair) for pair in pairs], device, effort))
    return min(found, key=lambda timing: timing.p50)


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large square product of random matrices."""
    side = MATMUL_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    effort = Effort(graph_ms=20, rounds=10, warmup=3)
    with own_stream(device):
        time_of = measure([lambda: a @ b], device, effort)
    return 2 * side**3 / (time_of.p50 / 1e3)


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Bytes allocated at the peak of one call, above what was allocated before; None on a CPU."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def host_time(
    call: Call, device: torch.device, batches: int = 20, calls: int = 50
) -> tuple[float, float, float]:
    """Microseconds (20th, 50th, 80th percentile) that the host spends on one call.

    Nothing waits for the device within a batch of calls; between batches it catches up, so that its
    queue never fills.
    """
    call()
    samples = []
    for _ in range(batches + 1):
        _synchronise(device)
        started = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append(1e6 * (time.perf_counter() - started) / calls)
    _synchronise(device)
    return percentiles(samples[1:])


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _run(variants: Sequence[Call], calls: int) -> None:
    kept = [None] * len(variants)
    for i in range(calls):
        kept[i % len(variants)] = variants[i % len(variants)]()


def _measure_on_cpu(variants: Sequence[Call], effort: Effort) -> Timing:
    started = time.perf_counter()
    _run(variants, len(variants))
    each = 1e3 * (time.perf_counter() - started) / len(variants)
    calls = _calls(each, len(variants), effort)
    samples = []
    for _ in range(effort.warmup + effort.rounds):
        started = time.perf_counter()
        _run(variants, calls)
        samples.append(1e3 * (time.perf_counter() - started) / calls)
    return Timing(*percentiles(samples[effort.warmup :]), calls, effort.rounds, "perf_counter")


def _measure_graph(variants: Sequence[Call], effort: Effort) -> Timing:
    calls = len(variants)
    graph = _capture(variants, calls)
    (each,) = _readings(graph.replay, Effort(rounds=1, warmup=2, warmup_seconds=0))
    calls = _calls(each / calls, len(variants), effort)
    if calls > len(variants):
        del graph  # with the memory of its results
        graph = _capture(variants, calls)
    samples = [ms / calls for ms in _readings(graph.replay, effort)]
    return Timing(*percentiles(samples), calls, effort.rounds, "cuda graph")


def _capture(variants: Sequence[Call], calls: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        _run(variants, calls)
    return graph


def _measure_events(variants: Sequence[Call], effort: Effort) -> Timing:
    calls = len(variants)

    def one_round() -> None:
        _run(variants, calls)

    (each,) = _readings(one_round, Effort(rounds=1, warmup=1, warmup_seconds=0))
    calls = _calls(each / calls, len(variants), effort)
    samples = [ms / calls for ms in _readings(one_round, effort)]
    return Timing(*percentiles(samples), calls, effort.rounds, "events")


def _readings(one_round: Call, effort: Effort) -> list[float]:
    """Milliseconds on the device of each round after the warm-up."""
    started = time.perf_counter()
    for _ in range(effort.warmup):
        one_round()
    while time.perf_counter() - started < effort.warmup_seconds:  # the clock of an idle GPU is low
        one_round()
        torch.cuda.synchronize()
    pairs = []
    for _ in range(effort.rounds):
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        one_round()
        pair[1].record()
        pairs.append(pair)
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def _calls(each: float, variants: int, effort: Effort) -> int:
    """Calls of `each` ms that fill a round: whole turns of the variants."""
    turns = math.ceil(effort.graph_ms / max(each, 1e-6) / variants)
    return variants * max(1, min(turns, MOST_CALLS // variants))
