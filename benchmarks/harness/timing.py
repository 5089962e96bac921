"""Time of one call of something short, on a GPU with cold caches or on a CPU.

On a GPU a call takes 10 to 1000 us. Several sets of inputs take turns, so that what a call reads
has left the L2 cache since it was last used; many calls are captured in one CUDA graph, so that the
host does not limit them; the graph is replayed between two events, several times.
"""

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    """How long a figure is measured."""

    graph_ms: float = 2.0  # least work between two readings of the clock
    rounds: int = 20  # readings
    warmup: int = 5  # rounds before the first reading, and at least
    warmup_seconds: float = 0.2  # of them, on a GPU


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

    @property
    def figures(self) -> dict[str, float | str]:
        """A row's figures: percentiles and method."""
        times = {"ms_p20": self.p20, "ms_p50": self.p50, "ms_p80": self.p80}
        return {**times, "method": self.method}


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th, interpolated; of one sample, itself."""
    if len(samples) < 2:
        return (samples[0],) * 3
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return cuts[1], statistics.median(samples), cuts[7]


def spread(name: str, samples: Sequence[float]) -> dict[str, float]:
    """Return the percentiles under the names that rows have for them."""
    return {f"{name}_p{p}": value for p, value in zip((20, 50, 80), percentiles(samples))}


class Marks:
    """Moments on a device's clock: on a GPU events, which the host does not wait for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.moments: list[torch.cuda.Event | float] = []

    def mark(self) -> None:
        """Note this moment."""
        if self.device.type == "cuda":
            self.moments.append(torch.cuda.Event(enable_timing=True))
            self.moments[-1].record()
        else:
            self.moments.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Wait for the last moment, return the time from each to the next, and forget them."""
        synchronise(self.device)
        pairs, self.moments = list(itertools.pairwise(self.moments)), []
        if self.device.type == "cuda":
            return [a.elapsed_time(b) for a, b in pairs]
        return [1e3 * (b - a) for a, b in pairs]


def sets_needed(touched: int, device: torch.device) -> int:
    """Return how many sets of tensors take turns, if a call touches `touched` bytes of one."""
    if device.type != "cuda":
        return 1
    cache = max(MIN_L2, torch.cuda.get_device_properties(device).L2_cache_size)
    return max(1, math.ceil(L2_TURNOVER * cache / max(touched, 1)))


@contextlib.contextmanager
def own_stream(device: torch.device):
    """Switch to a stream that graphs can be captured on; prepare on it what is captured.

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
    """Time one call of `variants`, the same call on different inputs, which take turns.

    The results of a call are kept until all other variants have run, so that they are not written
    to the memory, still in the cache, of the call before. On a GPU, call it within `own_stream`.
    """
    if device.type != "cuda":
        return _measure_rounds(variants, device, effort, "perf_counter", capture=False)
    for _ in range(3):  # compiles, allocates, fills caches of launches
        _run(variants, len(variants))
    torch.cuda.synchronize(device)
    try:
        return _measure_rounds(variants, device, effort, "cuda graph", capture=True)
    except Exception as error:
        torch.cuda.synchronize(device)  # raises where the device itself has failed
        while error.__context__ is not None:  # ending a broken capture raises once more
            error = error.__context__
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        return _measure_rounds(variants, device, effort, f"events ({message})", capture=False)


def copy_time(nbytes: int, device: torch.device, effort: Effort) -> Timing:
    """Time the yardstick: moving `nbytes`, half of them read and half written.

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
    with own_stream(device):
        found = [measure([partial(mover, *p) for p in pairs], device, effort) for mover in movers]
    return min(found, key=lambda timing: timing.p50)


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return the FLOP/s of a large square matmul of random numbers."""
    side = MATMUL_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    effort = Effort(graph_ms=20, rounds=10, warmup=3)
    with own_stream(device):
        time_of = measure([lambda: a @ b], device, effort)
    return 2 * side**3 / (time_of.p50 / 1e3)


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Return the bytes that one call allocates at its peak, None on a CPU."""
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
    """Return the microseconds (20th, 50th, 80th percentile) that the host spends on one call.

    Nothing waits for the device within a batch of calls; it catches up between batches.
    """
    call()
    samples = []
    for _ in range(batches + 1):
        synchronise(device)
        started = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append(1e6 * (time.perf_counter() - started) / calls)
    synchronise(device)
    return percentiles(samples[1:])


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _run(variants: Sequence[Call], calls: int) -> None:
    kept = [None] * len(variants)
    for i in range(calls):
        kept[i % len(variants)] = variants[i % len(variants)]()


def _measure_rounds(
    variants: Sequence[Call], device: torch.device, effort: Effort, method: str, capture: bool
) -> Timing:
    def make_round(calls: int) -> Call:
        return _capture(variants, calls) if capture else partial(_run, variants, calls)

    calls = len(variants)
    one_round = make_round(calls)
    (each,) = _readings(one_round, device, Effort(rounds=1, warmup=2, warmup_seconds=0))
    turns = math.ceil(effort.graph_ms / max(each, 1e-6))
    calls *= max(1, min(turns, MOST_CALLS // calls))  # whole turns of the variants
    if calls > len(variants):
        del one_round  # with the memory of a graph's results
        one_round = make_round(calls)
    samples = [ms / calls for ms in _readings(one_round, device, effort)]
    return Timing(*percentiles(samples), calls, effort.rounds, method)


def _capture(variants: Sequence[Call], calls: int) -> Call:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        _run(variants, calls)
    return graph.replay


def _readings(one_round: Call, device: torch.device, effort: Effort) -> list[float]:
    """Return milliseconds on the device of each round after the warm-up."""
    started = time.perf_counter()
    for _ in range(effort.warmup):
        one_round()
    while device.type == "cuda" and time.perf_counter() - started < effort.warmup_seconds:
        one_round()  # the clock of an idle GPU is low
        synchronise(device)
    marks = Marks(device)
    marks.mark()
    for _ in range(effort.rounds):
        one_round()
        marks.mark()
    return marks.milliseconds()
