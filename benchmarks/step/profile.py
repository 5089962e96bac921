"""Where the time of a step goes, from torch's profiler.

On a GPU every kernel, copy and fill belongs to one category: what the host started in the range of
the encoder or of the optimizer to these, the others by their names; where two run at once, the time
is the first one's. A CUDA graph is started as a whole: its encoder is not told from the rest. On a
CPU the time of an operator without the operators it calls takes the place of a kernel. Idle is the
time in which nothing of this ran.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.harness.timing import synchronise

CATEGORIES = ("GEMM", "attention", "our kernels", "other elementwise", "optimizer", "encoder")
CATEGORIES += ("idle",)
WINDOW = "profiled steps"
SHOWN_KERNELS, SHOWN_GAPS = 40, 5
NAME_LENGTH = 96
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
HOST = ("cuda_runtime", "cuda_driver")

GENERATED = re.compile(r"^triton_(?!tem)")  # Inductor's, named after whatever they were made from
OURS = re.compile(
    r"^(adaln|gate_residual|align_loss|sum_chunks|euler_maruyama)\w*|^repa_fast::(?!attention)"
)
OPTIMIZER = re.compile(r"adamw_ema_kernel|squares_kernel|advance_kernel|multi_tensor_apply")
ATTENTION = re.compile(
    r"attention|flash|fmha|sdpa|cudnn_generated_fort_native|compute_dot_do_o|convert_dq",
    re.IGNORECASE,
)
GEMM = re.compile(
    r"gemm|cutlass|cublas|nvjet|xmma|wgmma|splitk|triton_tem|convolution|conv2d"  # kernels
    r"|^aten::(mm|addmm|bmm|baddbmm|matmul|linear|mv|addmv|dot)(_|$)|^mkldnn::_linear",  # operators
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Interval:
    """Something that ran, from `start` to `end` in microseconds."""

    start: float
    end: float
    category: str
    name: str = ""


@dataclass(frozen=True)
class Breakdown:
    """One step on average."""

    busy_ms: dict[str, float]  # by category, all but idle
    window_ms: float  # wall clock under the profiler
    launches: float | None  # of kernels, copies, fills; a CUDA graph is one; None on a CPU
    kernels: list[dict] = field(default_factory=list)  # the slowest: name, category, ms, calls
    gaps: list[dict] = field(default_factory=list)  # the longest: us, the kernels around them

    def milliseconds(self, step_ms: float) -> dict[str, float]:
        """Return ms by category that add up to `step_ms` or the busy time; the rest is idle."""
        idle = max(0.0, step_ms - sum(self.busy_ms.values()))
        return {name: {**self.busy_ms, "idle": idle}[name] for name in CATEGORIES}


def category_of(name: str) -> str:
    """Return the category of a kernel or operator outside the encoder and the optimizer."""
    if GENERATED.search(name):
        return "other elementwise"
    patterns = {"our kernels": OURS, "optimizer": OPTIMIZER, "attention": ATTENTION, "GEMM": GEMM}
    found = (category for category, pattern in patterns.items() if pattern.search(name))
    return next(found, "other elementwise")


def range_of(name: str) -> str | None:
    """Return the category that a range of the profiler stands for, if any."""
    if name in ("encoder", "optimizer"):
        return name
    return "optimizer" if name.startswith("Optimizer.") else None


def named(category: str, function: Callable) -> Callable:
    """Return `function`, whose calls the profiler shows as a range of that category."""

    def call(*arguments, **options):
        with record_function(category):
            return function(*arguments, **options)

    return call


def run(step: Callable[[], None], steps: int, device: torch.device, trace: Path) -> Breakdown:
    """Profile `steps` calls; write the Chrome trace to `trace`."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    synchronise(device)
    with profile(activities=activities) as profiler:
        if cuda:
            step()  # the profiler's own first use of the device
            synchronise(device)
        with record_function(WINDOW):
            for _ in range(steps):
                step()
            synchronise(device)
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text(), strict=False)["traceEvents"]
    return breakdown(events, steps, cuda)


def breakdown(events: Sequence[dict], steps: int, cuda: bool) -> Breakdown:
    """Break down a Chrome trace's events, with `steps` steps in the range WINDOW."""
    complete = [event for event in events if event.get("ph") == "X"]
    named = (event for event in complete if event["name"] == WINDOW)
    window = next(event for event in named if event.get("cat") == "user_annotation")
    start, end = window["ts"], window["ts"] + window["dur"]
    inside = [event for event in complete if start <= event["ts"] < end]
    intervals, launches = on_device(inside) if cuda else (list(on_host(inside)), 0)
    busy = {name: us / 1e3 / steps for name, us in exclusive(intervals, end).items()}
    window = (end - start) / 1e3 / steps
    if not cuda:
        return Breakdown(busy, window, None)
    kernels = by_kernel(intervals, steps)
    return Breakdown(busy, window, launches / steps, kernels, gaps(intervals))


def by_kernel(intervals: Sequence[Interval], steps: int) -> list[dict]:
    """Return the kernels that take most time, with ms and calls of a step."""
    total: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    for interval in intervals:
        entry = total[interval.name, interval.category]
        entry[0] += interval.end - interval.start
        entry[1] += 1
    ordered = sorted(total.items(), key=lambda item: -item[1][0])[:SHOWN_KERNELS]
    rows = []
    for (name, category), (us, calls) in ordered:
        figures = {"ms": round(us / 1e3 / steps, 4), "calls": round(calls / steps, 2)}
        rows.append({"name": name[:NAME_LENGTH], "category": category, **figures})
    return rows


def gaps(intervals: Sequence[Interval]) -> list[dict]:
    """Return the longest times in which nothing ran between two kernels."""
    found, last = [], None
    for interval in sorted(intervals, key=lambda one: one.start):
        if last is not None and interval.start > last.end:
            around = {"before": last.name[:NAME_LENGTH], "after": interval.name[:NAME_LENGTH]}
            found.append({"us": round(interval.start - last.end, 1), **around})
        if last is None or interval.end > last.end:
            last = interval
    return sorted(found, key=lambda gap: -gap["us"])[:SHOWN_GAPS]


def on_device(events: Sequence[dict]) -> tuple[list[Interval], int]:
    """Return what ran on the GPU, and how often the host started something."""
    hosts = [e for e in events if e.get("cat") in HOST and "correlation" in e.get("args", {})]
    ranges = [e for e in events if e.get("cat") == "user_annotation" and range_of(e["name"])]
    by_launch = {
        launch["args"]["correlation"]: range_of(around["name"])
        for launch in hosts
        for around in ranges
        if launch["tid"] == around["tid"]
        if around["ts"] <= launch["ts"] < around["ts"] + around["dur"]
    }
    intervals, launches = [], set()
    for event in events:
        if event.get("cat") in DEVICE:
            number, end = event["args"].get("correlation"), event["ts"] + event["dur"]
            category = by_launch.get(number) or category_of(event["name"])
            intervals.append(Interval(event["ts"], end, category, event["name"]))
            launches.add(number)
    return intervals, len(launches)


def on_host(events: Sequence[dict]) -> Iterator[Interval]:
    """Cut up the operators of each thread so that every moment is the innermost one's."""
    threads = defaultdict(list)
    for event in events:
        if event.get("cat") in ("cpu_op", "user_annotation"):
            threads[event["tid"]].append(event)
    for members in threads.values():
        yield from innermost(sorted(members, key=lambda event: (event["ts"], -event["dur"])))


def innermost(events: Sequence[dict]) -> Iterator[Interval]:
    """Do so for nested events, ordered by beginning; the profiler's ranges give nothing."""
    stack: list[tuple[float, str | None, str | None]] = []  # end, own category, range's category
    clock = 0.0

    def until(moment: float) -> Iterator[Interval]:
        nonlocal clock
        while stack and stack[-1][0] <= moment:
            end, own, _ = stack.pop()
            if own and end > clock:
                yield Interval(clock, end, own)
            clock = max(clock, end)
        if stack and stack[-1][1] and moment > clock:
            yield Interval(clock, moment, stack[-1][1])
        clock = max(clock, moment)

    for event in events:
        yield from until(event["ts"])
        around = stack[-1][2] if stack else None
        if event["cat"] == "user_annotation":
            own, around = None, around or range_of(event["name"])
        else:
            own = around or category_of(event["name"])
        stack.append((event["ts"] + event["dur"], own, around))
    yield from until(float("inf"))


def exclusive(intervals: Sequence[Interval], end: float) -> dict[str, float]:
    """Return microseconds of each category up to `end`, every moment counted once."""
    total = dict.fromkeys((name for name in CATEGORIES if name != "idle"), 0.0)
    covered = 0.0
    for interval in sorted(intervals, key=lambda one: one.start):
        last = min(interval.end, end)
        total[interval.category] += max(0.0, last - max(interval.start, covered))
        covered = max(covered, last)
    return total
