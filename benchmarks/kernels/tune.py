"""Launch parameters of the Triton kernels, swept: `python -m benchmarks.kernels.tune`.

For each kernel at SiT-XL/2's shapes, every tile is checked against the reference and timed as in
benchmarks.harness.timing. Rows are appended to tune.jsonl as they come; tables, fastest first, are
printed. Nothing is changed: the constants stand in the kernels' files.
"""

import importlib
import inspect
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from benchmarks.harness import timing
from benchmarks.harness.environment import parser, results_folder
from benchmarks.harness.rows import append, grid
from benchmarks.kernels import gate
from benchmarks.kernels.measure import Bench, Row
from benchmarks.kernels.ops import BRANCH, Problem, Tensors, problems, short
from benchmarks.kernels.run import lost
from repa_fast.kernels.attention.backends import describe

WARPS, STAGES, ROWS, CHUNKS = (4, 8, 16), (1, 2, 3), (2, 4, 8), (4, 8, 16)
HEADINGS = ("kernel", "shape", "dtype", "warps", "stages", "rows", "chunks", "p50 ms", "% of copy")
KERNELS = {
    "gate_residual_adaln_backward": (
        "gate_residual_adaln",
        ("dx", "dbranch"),
        ("dgate", "dshift", "dscale"),
    ),
    "gate_residual_adaln_forward": ("gate_residual_adaln", ("out", "y"), ()),
    "adaln_backward": ("adaln", ("dx",), ("dshift", "dscale")),
    "gate_residual_backward": ("gate_residual", ("dbranch",), ("dgate",)),
    "adaln_forward": ("adaln", ("y",), ()),
    "gate_residual_forward": ("gate_residual", ("out",), ()),
    "align_loss_backward": ("align_loss", ("dprediction",), ()),
    "align_loss_forward": ("align_loss", ("patches",), ()),
}
"""Kernel -> its op, what it writes, and the names of its sums over tokens; by importance."""
RESULTS = {
    "gate_residual_adaln": ("out", "y", "statistics"),
    "adaln": ("y", "statistics"),
    "gate_residual": ("out",),
    "align_loss": ("loss", "patches"),
}
"""Op -> what the Triton kernel's forward pass returns."""

Bind = Callable[[Any], tuple[Any, torch.Tensor | None, Tensors]]
"""tile -> its launch, its partial sums if it has any, and what it writes, by name."""


def sources(op: str) -> ModuleType:
    """Return the module with an op's kernels, which needs Triton."""
    folder = "gate_residual_adaln" if op == "gate_residual" else op
    return importlib.import_module(f"repa_fast.kernels.{folder}.triton_kernels")


def constants(op: str) -> dict[str, Any]:
    """Return the arguments of an op's kernels that are not tensors."""
    return {"eps": 1e-12 if op == "align_loss" else 1e-6, "out_dtype": BRANCH}


def call(function: Callable, known: Mapping[str, Any]) -> Any:
    """Call a function with those of the known values that it has parameters for."""
    names = inspect.signature(function).parameters
    return function(**{name: known[name] for name in names if name in known})


def bind_on(kernel: str, problem: Problem, seed: int, device: torch.device) -> Bind:
    """Prepare launches of a kernel on inputs of `seed`, and on what the forward pass saves."""
    from repa_fast.backend.rows import empty_partials

    op, written, sums = KERNELS[kernel]
    tensors, module = problem.make_inputs(seed, device), sources(op)
    outputs = problem.case.outputs(problem.shape, problem.dtype)
    upstream = dict(zip((f"d{n}" for n in outputs), problem.make_upstream(seed, device)))
    known = {**tensors, **upstream, **constants(op)}
    forward = getattr(module, f"{op}_forward", None) or module.forward
    known |= zip(RESULTS[op], gate.as_tuple(call(forward, known)))
    known |= {name: torch.empty_like(known[name[1:]]) for name in written if name not in known}
    launch = getattr(module, f"{kernel}_launch")

    def bind(tile: Any) -> tuple[Any, torch.Tensor | None, Tensors]:
        partials = empty_partials(known[written[0]], len(sums)) if sums else None
        launched = call(launch, {**known, "partials": partials, "tile": tile})
        return launched, partials, {name: known[name] for name in written}

    return bind


def points(kernel: str) -> list[tuple[Any, int | None]]:
    """Return (tile, programs per sample) to try; the latter only for sums over tokens.

    A loop over fewer rows than stages has nothing to fill them with.
    """
    from repa_fast.backend.rows import Tile

    if KERNELS[kernel][2]:
        found = itertools.product(WARPS, STAGES, CHUNKS)
        return [(Tile(warps, stages), chunks) for warps, stages, chunks in found]
    found = itertools.product(WARPS, STAGES, ROWS)
    return [(Tile(warps, stages, rows), None) for warps, stages, rows in found if stages <= rows]


def sweep(bench: Bench, kernel: str, problem: Problem, end: float) -> Iterator[Row]:
    """Return a row per point, until time.monotonic() is `end`."""
    op, _, sums = KERNELS[kernel]
    device = bench.device
    expected = gate.expected(problem, problem.case.reference, device)
    mode = "backward" if kernel.endswith("backward") else "forward"
    nbytes = problem.necessary_bytes(mode)
    copy = bench.copy(nbytes)
    with timing.own_stream(device):
        sets = range(timing.sets_needed(nbytes, device))
        binds = [bind_on(kernel, problem, seed, device) for seed in sets]
        for tile, chunks in points(kernel):
            if time.monotonic() > end:
                print(f"time limit: the rest of {kernel} at {problem.name} left out", flush=True)
                return
            head = {
                "kernel": kernel, "op": op, "shape": list(problem.shape),
                "dtype": short(problem.dtype), "warps": tile.warps, "stages": tile.stages,
                "rows": tile.rows, "chunks": chunks, **bench.stamp,
            }  # fmt: skip
            try:
                figures = _point(bench, binds, tile, chunks, sums, expected)
                figures["share_of_copy"] = copy.p50 / figures["ms_p50"]
            except Exception as error:  # too many registers, too much shared memory
                figures = {"status": "failed", "message": describe(error)}
            yield {**head, **figures}


def _point(
    bench: Bench, binds: list[Bind], tile: Any, chunks: int | None, sums: tuple[str, ...], expected
) -> Row:
    """Check and time one tile."""
    from repa_fast.backend import rows

    # The number of programs per sample is a constant of the module, not of a tile.
    chosen = rows.CHUNKS if chunks is None else chunks
    with mock.patch.object(rows, "CHUNKS", chosen):
        bound = [bind(tile) for bind in binds]
    calls = [partial(_call, launch, partials) for launch, partials, _ in bound]
    written = bound[0][2]
    for tensor in written.values():
        tensor.fill_(float("nan"))  # not what another tile has written
    totals = calls[0]()
    got = {**written, **(dict(zip(sums, totals.unbind(0))) if sums else {})}
    if "patches" in got:  # of cosines; their mean is torch's
        got = {"loss": -got["patches"][..., 0].mean(-1)}
    expected.compare(got)
    return {"status": "ok", **timing.measure(calls, bench.device, bench.effort).figures}


def _call(launch: Any, partials: torch.Tensor | None) -> torch.Tensor | None:
    """Run the launch and, if it has sums, their second stage."""
    from repa_fast.backend.rows import sum_chunks

    launch.run()
    return None if partials is None else sum_chunks(partials, BRANCH)


def table(rows: list[Row]) -> str:
    """Return the table of one kernel and problem, fastest first, failures last."""
    body = []
    for row in sorted(rows, key=lambda row: row.get("ms_p50", float("inf"))):
        figures = [row.get("message"), ""]
        if row["status"] == "ok":
            figures = [f"{row['ms_p50']:.4f}", f"{100 * row['share_of_copy']:.0f}"]
        shape = "x".join(map(str, row["shape"]))
        body.append((row["kernel"], shape, *(row[name] for name in HEADINGS[2:7]), *figures))
    return "\n".join(grid(HEADINGS, body))


def main(argv: list[str] | None = None) -> int:
    """Sweep until the limit; return 3 if the GPU was lost."""
    flags = parser(__doc__, "folder for tune.jsonl", device=False)
    flags.add_argument("--kernel", action="append", choices=tuple(KERNELS), help="repeatable; all")
    flags.add_argument("--limit", type=float, default=150, help="seconds; begins nothing later")
    arguments = flags.parse_args(argv)
    if not torch.cuda.is_available():
        print("tuning needs a GPU: no CUDA device")
        return 0
    bench = Bench(torch.device("cuda"), timing.QUICK)
    end = time.monotonic() + arguments.limit
    file = (arguments.out or results_folder("kernels")) / "tune.jsonl"
    wanted = [
        (kernel, problem)  # one dtype at a time, and its kernels by importance
        for dtype in (torch.float32, torch.bfloat16)
        for kernel in arguments.kernel or KERNELS
        for problem in problems(KERNELS[kernel][0], bench.device)
        if problem.dtype == dtype
    ]
    for kernel, problem in wanted:
        if time.monotonic() > end:
            print(f"time limit: {kernel} at {problem.name} left out", flush=True)
            continue
        rows = []
        for row in sweep(bench, kernel, problem, end):
            append(file, row)
            rows.append(row)
            if row["status"] != "ok" and lost(bench.device):
                return 3
        print(table(rows), flush=True)
        bench.tidy()
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
