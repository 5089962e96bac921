"""What a rehearsed step says of itself: synchronisations, graphs, launches, host time, memory."""

import argparse
import contextlib
import cProfile
import ctypes
import json
import os
import pstats
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch

from benchmarks.gpu.pretended import waits

WARMUP, WATCHED, TIMED, PROFILED = 2, 3, 5, 3
CAPTURED = 2
"""More steps before the watched ones where the step becomes a CUDA graph."""
FUNCTIONS, WIDTH, MOST_GRAPHS = 5, 100, 4096
FIGURES = {"steps": 3, "warmup": 1}
"""How many steps the real figures take, at most."""
GIB = 2**30
BLOCKS = ("sit.py", "baseline.py")
"""Files whose compiled `forward` is a block's."""
GRAPHED = ("graph", "bf16-residual")
JUDGED = ("kernels", "one-pass", *GRAPHED)
"""Configurations of the ladder whose steps `verdicts` judges, and those that are one CUDA graph."""
MOST_BLOCK_GRAPHS, MOST_GIB = 3, 79.1

_current: dict = {}
_began = {"time": 0.0, "breaks": 0}


def library() -> ctypes.CDLL:
    """Return the pretended runtime of this process."""
    found = ctypes.CDLL(None)
    for name in ("launches", "graph_launches", "replayed", "strays", "waits"):
        getattr(found, f"pretended_{name}").restype = ctypes.c_long
    for name in ("used", "peak"):
        getattr(found, f"pretended_{name}").restype = ctypes.c_size_t
    return found


def counts() -> Counter:
    """Return what the card has counted so far."""
    card = library()
    names = ("launches", "graph_launches", "replayed", "strays", "waits")
    return Counter({name: getattr(card, f"pretended_{name}")() for name in names})


def write(row: dict) -> None:
    """Append a row to the file of PRETENDED_REPORT, if it is set."""
    file = os.environ.get("PRETENDED_REPORT")
    if file:
        with open(file, "a") as rows:
            rows.write(json.dumps(row) + "\n")


# Compiled graphs


def begin(rung: str = "") -> None:
    """Count graphs, breaks and the peak of memory from now on."""
    torch._dynamo.utils.set_compilation_metrics_limit(MOST_GRAPHS)
    _began.update(time=time.time(), breaks=breaks())
    _current.update(rung=rung)
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def graphs() -> list[str]:
    """File and function of each graph that was compiled since the last `begin`."""
    return [
        f"{Path(one.co_filename).name}:{one.co_name}"
        for one in torch._dynamo.utils.get_compilation_metrics()
        if one.co_filename and one.is_forward is not False and not one.fail_type
        if one.start_time >= _began["time"]
    ]


def breaks() -> int:
    """Graph breaks of this process."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())


# A step


def reported(figures: Callable) -> Callable:
    """`figures` of benchmarks.step.step, of few steps, after a look at what the step does."""

    def observed(stepper, feed, arguments: argparse.Namespace, trace: Path) -> dict:
        write({**head(arguments), "micro_batch": stepper.micro_batch, **observe(stepper, feed)})
        few = {name: min(most, getattr(arguments, name)) for name, most in FIGURES.items()}
        return figures(stepper, feed, argparse.Namespace(**{**vars(arguments), **few}), trace)

    return observed


def named(measure: Callable, rungs: Mapping) -> Callable:
    """`measure` of the ladder, whose configuration the report names; a failure is reported too."""

    def measured(rung, arguments: argparse.Namespace) -> dict:
        begin(next((name for name, one in rungs.items() if one is rung), "?"))
        try:
            return measure(rung, arguments)
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            write({**head(arguments), "error": why, **memory()})
            raise

    return measured


def head(arguments: argparse.Namespace) -> dict:
    """Return what a row begins with."""
    return {
        "kind": "step",
        "rung": _current.get("rung", ""),
        "preset": arguments.preset,
        "batch": arguments.batch,
        "micro_batch": arguments.micro_batch or arguments.batch,
    }


def observe(stepper, feed) -> dict:
    """Steps of each kind: to warm up, watched, timed, under Python's profiler."""
    warm_steps = WARMUP + CAPTURED * is_graphed(stepper)
    for _ in range(warm_steps):
        stepper.step(feed())
    torch.cuda.synchronize()
    warm = Counter(graphs())
    before, seen = counts(), len(waits)
    with warnings_of_synchronisations():
        for _ in range(WATCHED):
            stepper.step(feed())
    found = counts()
    found.subtract(before)
    process, wall = host_ms(lambda: stepper.step(feed()))
    functions = slowest(lambda: stepper.step(feed()))
    late = Counter(graphs()) - warm
    return {
        "warm_steps": warm_steps,
        "synchronisations": found["waits"] / WATCHED,
        "places": dict(Counter(waits[seen:])),
        "graphs": dict(Counter(graphs())),
        "block_graphs": sum(n for name, n in warm.items() if name.startswith(BLOCKS)),
        "recompilations": dict(late),
        "graph_breaks": breaks() - _began["breaks"],
        "launches": found["launches"] / WATCHED,
        "graph_launches": found["graph_launches"] / WATCHED,
        "replayed": found["replayed"] / WATCHED,
        "strays": counts()["strays"],
        "host_ms": process,
        "wall_ms": wall,
        "functions": functions,
        **memory(),
    }


def is_graphed(stepper) -> bool:
    """Return whether a step becomes a CUDA graph, whatever the config asks for."""
    from repa_fast.train.graph import GraphedStep

    return isinstance(getattr(stepper, "take_step", None), GraphedStep)


@contextlib.contextmanager
def warnings_of_synchronisations() -> Iterator[None]:
    """torch warns wherever the host waits; `waits` grows."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def host_ms(step: Callable[[], None]) -> tuple[float, float]:
    """Milliseconds of a step, the least: of one core, all threads together, and by the clock."""
    samples = []
    for _ in range(TIMED):
        torch.cuda.synchronize()
        process, wall = time.process_time(), time.perf_counter()
        step()
        samples.append((time.process_time() - process, time.perf_counter() - wall))
    return tuple(1e3 * min(one) for one in zip(*samples))


def slowest(step: Callable[[], None]) -> list[list]:
    """Return the five functions with the most time of their own: name, ms and calls a step.

    Python's profiler sees one thread, so the backward pass runs in it too; and it makes all slower,
    what has many calls most.
    """
    profile = cProfile.Profile()
    with torch.autograd.set_multithreading_enabled(False):
        profile.enable()
        for _ in range(PROFILED):
            step()
        profile.disable()
    rows = [
        (own, calls, where) for where, (_, calls, own, *_) in pstats.Stats(profile).stats.items()
    ]
    return [
        [name_of(where), round(1e3 * own / PROFILED, 3), calls / PROFILED]
        for own, calls, where in sorted(rows, reverse=True)[:FUNCTIONS]
    ]


def name_of(where: tuple[str, int, str]) -> str:
    """Return a function's file (the last two parts), line and name; one of C has a name only."""
    file, line, name = where
    return f"{'/'.join(Path(file).parts[-2:])}:{line} {name}" if line else name


def memory() -> dict:
    """GiB at the peak, of tensors, of torch, and of the card since the process began."""
    return {
        "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "card_gib": library().pretended_peak() / GIB,
        "card_of_gib": torch.cuda.mem_get_info()[1] / GIB,
    }


def verdicts(rows: Iterable[Mapping]) -> list[str]:
    """Return a line for what may not be in the steps of JUDGED; the last row of a step counts.

    A step may not fail, wait for the device, compile late, compile its blocks more than
    MOST_BLOCK_GRAPHS times or take more than MOST_GIB; a GRAPHED one is a graph that is replayed.
    """
    last = {
        (row["rung"], row["preset"], row["batch"]): row
        for row in rows
        if row["kind"] == "step" and row["rung"] in JUDGED
    }
    return [
        f"{rung}, {preset}, {batch}: {wrong}"
        for (rung, preset, batch), row in last.items()
        for wrong in faults(row)
    ]


def faults(row: Mapping) -> list[str]:
    """Return what is wrong with a step's row."""
    if "error" in row:
        return [row["error"]]
    graphed = row["rung"] in GRAPHED
    late = ", ".join(f"{n} x {name}" for name, n in row["recompilations"].items())
    found = {
        f"waits for the device {row['synchronisations']:g} times a step": row["synchronisations"],
        f"compiles after step {row['warm_steps']}: {late}": late,
        f"{row['block_graphs']} graphs of blocks, expected at most {MOST_BLOCK_GRAPHS}": (
            row["block_graphs"] > MOST_BLOCK_GRAPHS
        ),
        f"{row['card_gib']:.1f} GiB, expected at most {MOST_GIB}": row["card_gib"] > MOST_GIB,
        "no CUDA graph is replayed": graphed and not row["graph_launches"],
    }
    return [text for text, wrong in found.items() if wrong]


# For people


def read(file: Path) -> list[dict]:
    """Read the report's rows."""
    return [json.loads(one) for one in Path(file).read_text().splitlines()]


def table(file: Path) -> str:
    """Return a table of the report's rows, at most 100 columns wide; times in ms."""
    rows, lines = read(file), []
    steps = [row for row in rows if row["kind"] == "step"]
    if steps:
        lines.append(HEADER)
        lines += [line(row) for row in steps]
    for row in steps:
        lines += details(row)
    for row in rows:
        if row["kind"] == "tests":
            lines += tests(row)
    return "\n".join(part for one in lines for part in folded(one))


HEADER = (
    "configuration preset         batch syncs graphs block late brk "
    "launch graph in it   host   wall  GiB"
)


def folded(text: str) -> list[str]:
    """Lines of at most WIDTH columns, the later ones indented."""
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * 8, drop_whitespace=False) or [""]


def line(row: dict) -> str:
    """Return a step in one line."""
    batch = f"{row['batch']}/{row['micro_batch']}"
    what = f"{row['rung'] or '-':<13} {row['preset'][:12]:<12} {batch:>7}"
    if "error" in row:
        return f"{what} {row['error']} ({row['card_gib']:.1f} of {row['card_of_gib']:.1f} GiB)"
    return (
        f"{what} {row['synchronisations']:>5.1f} {sum(row['graphs'].values()):>6} "
        f"{row['block_graphs']:>5} {sum(row['recompilations'].values()):>4} "
        f"{row['graph_breaks']:>3} {row['launches']:>6.0f} {row['graph_launches']:>5.0f} "
        f"{row['replayed']:>5.0f} {row['host_ms']:>6.1f} {row['wall_ms']:>6.1f} "
        f"{row['card_gib']:>4.1f}"
    )


def details(row: dict) -> list[str]:
    """Return where a step waits and compiles, and what takes most of its host time."""
    if "error" in row:
        return []
    name = row["rung"] or "a step"
    lines = ["", f"{name}, {row['preset']}, {row['micro_batch']} of {row['batch']}"]
    lines.append(
        f"  peak GiB: {row['allocated_gib']:.1f} of tensors, {row['reserved_gib']:.1f} reserved, "
        f"{row['card_gib']:.1f} of {row['card_of_gib']:.1f} on the card since the process began"
    )
    lines += [f"  waits {n} x at {where}" for where, n in row["places"].items()]
    lines += [f"  compiled late: {n} x {name}" for name, n in row["recompilations"].items()]
    if row["strays"]:
        lines.append(f"  {row['strays']} launches beside a capture")
    lines += [f"  {ms:8.2f} ms {calls:7.0f} calls  {name}" for name, ms, calls in row["functions"]]
    return lines


def tests(row: dict) -> list[str]:
    """Return what became of the tests."""
    lines = ["", f"tests: {row['passed']} passed, {row['numbers']} wrong in numbers alone, "]
    lines[-1] += f"{row['skipped']} skipped, {len(row['failed'])} failed"
    return lines + [f"  {name}: {why}" for name, why in row["failed"].items()]
