"""Launch parameters of the Triton kernels, swept: `python -m benchmarks.kernels.tune`.

For each kernel at SiT-XL/2's shapes, every tile is checked against the reference and timed as in
benchmarks.harness.timing. Rows are appended to tune.jsonl as they come; tables, fastest first, are
printed. Nothing is changed: the constants stand in the kernels' files.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import timing
from benchmarks.harness.environment import results_folder
from benchmarks.kernels import gate
from benchmarks.kernels.measure import Bench, Row
from benchmarks.kernels.ops import BRANCH, Problem, Tensors, problems, short
from benchmarks.kernels.run import lost
from repa_fast.kernels.attention.backends import describe

EPS = {"adaln": 1e-6, "align_loss": 1e-12}
WARPS, STAGES, ROWS, CHUNKS = (4, 8, 16), (1, 2, 3), (2, 4, 8), (4, 8, 16)
HEADINGS = ("kernel", "shape", "dtype", "warps", "stages", "rows", "chunks", "p50 ms", "% of copy")

Bind = Callable[[Any], tuple[Any, torch.Tensor | None, Tensors]]
"""tile -> its launch, its partial sums if it has any, and what it writes, by name."""


def gate_residual_adaln_backward(t: Tensors, upstream: list[torch.Tensor]) -> Bind:
    from repa_fast.kernels.adaln.triton_kernels import empty_partials
    from repa_fast.kernels.gate_residual_adaln import triton_kernels as kernels

    dout, dy = upstream
    out, _, statistics = kernels.gate_residual_adaln_forward(
        **t, eps=EPS["adaln"], out_dtype=BRANCH
    )
    dx, dbranch = torch.empty_like(out), torch.empty_like(t["branch"])

    def bind(tile):
        partials = empty_partials(out, 3)
        launch = kernels.gate_residual_adaln_backward_launch(
            dy, dout, out, t["branch"], t["gate"], t["scale"], statistics, dx, dbranch, partials,
            tile=tile,
        )  # fmt: skip
        return launch, partials, {"dx": dx, "dbranch": dbranch}

    return bind


def gate_residual_adaln_forward(t: Tensors, upstream: list[torch.Tensor]) -> Bind:
    from repa_fast.kernels.gate_residual_adaln import triton_kernels as kernels

    out, y, statistics = _stream_outputs(t["x"])

    def bind(tile):
        launch = kernels.gate_residual_adaln_forward_launch(
            **t, out=out, y=y, statistics=statistics, eps=EPS["adaln"], tile=tile
        )
        return launch, None, {"out": out, "y": y}

    return bind


def adaln_backward(t: Tensors, upstream: list[torch.Tensor]) -> Bind:
    from repa_fast.kernels.adaln import triton_kernels as kernels

    _, statistics = kernels.forward(**t, eps=EPS["adaln"], out_dtype=BRANCH)
    dx = torch.empty_like(t["x"])

    def bind(tile):
        partials = kernels.empty_partials(dx, 2)
        launch = kernels.adaln_backward_launch(
            upstream[0], t["x"], t["scale"], statistics, dx, partials, tile=tile
        )
        return launch, partials, {"dx": dx}

    return bind


def adaln_forward(t: Tensors, upstream: list[torch.Tensor]) -> Bind:
    from repa_fast.kernels.adaln import triton_kernels as kernels

    _, y, statistics = _stream_outputs(t["x"])

    def bind(tile):
        launch = kernels.adaln_forward_launch(
            **t, y=y, statistics=statistics, eps=EPS["adaln"], tile=tile
        )
        return launch, None, {"y": y}

    return bind


def gate_residual_backward(t: Tensors, upstream: list[torch.Tensor]) -> Bind:
    from repa_fast.kernels.adaln.triton_kernels import empty_partials
    from repa_fast.kernels.gate_residual_adaln import triton_kernels as kernels

    dbranch = torch.empty_like(t["branch"])

    def bind(tile):
        partials = empty_partials(dbranch, 1)
        launch = kernels.gate_residual_backward_launch(
            upstream[0], t["branch"], t["gate"], dbranch, partials, tile=tile
        )
        return launch, partials, {"dbranch": dbranch}

    return bind


def gate_residual_forward(t: Tensors, upstream: list[torch.Tensor]) -> Bind:
    from repa_fast.kernels.gate_residual_adaln import triton_kernels as kernels

    out = torch.empty_like(t["x"])

    def bind(tile):
        return kernels.gate_residual_forward_launch(**t, out=out, tile=tile), None, {"out": out}

    return bind


def align_loss_forward(t: Tensors, upstream: list[torch.Tensor]) -> Bind:
    from repa_fast.kernels.align_loss import triton_kernels as kernels

    patches = kernels.empty_patches(t["prediction"])

    def bind(tile):
        launch = kernels.align_loss_forward_launch(
            **t, patches=patches, eps=EPS["align_loss"], tile=tile
        )
        return launch, None, {"patches": patches}

    return bind


def align_loss_backward(t: Tensors, upstream: list[torch.Tensor]) -> Bind:
    from repa_fast.kernels.align_loss import triton_kernels as kernels

    _, patches = kernels.forward(**t, eps=EPS["align_loss"])
    dprediction = torch.empty_like(t["prediction"])

    def bind(tile):
        launch = kernels.align_loss_backward_launch(
            upstream[0], **t, patches=patches, dprediction=dprediction,
            tile=tile,
        )  # fmt: skip
        return launch, None, {"dprediction": dprediction}

    return bind


def _stream_outputs(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Memory for out, y and the statistics of a forward pass over x."""
    statistics = torch.empty(*x.shape[:2], 2, device=x.device)
    return torch.empty_like(x), torch.empty_like(x, dtype=BRANCH), statistics


KERNELS = {
    "gate_residual_adaln_backward": (
        "gate_residual_adaln",
        gate_residual_adaln_backward,
        ("dgate", "dshift", "dscale"),
    ),
    "gate_residual_adaln_forward": ("gate_residual_adaln", gate_residual_adaln_forward, ()),
    "adaln_backward": ("adaln", adaln_backward, ("dshift", "dscale")),
    "gate_residual_backward": ("gate_residual", gate_residual_backward, ("dgate",)),
    "adaln_forward": ("adaln", adaln_forward, ()),
    "gate_residual_forward": ("gate_residual", gate_residual_forward, ()),
    "align_loss_backward": ("align_loss", align_loss_backward, ()),
    "align_loss_forward": ("align_loss", align_loss_forward, ()),
}
"""Kernel -> its op, its setup, and the names of its sums over tokens; in order of importance."""


def points(kernel: str) -> list[tuple[Any, int | None]]:
    """(tile, programs per sample) to try; only sums over tokens have programs per sample.

    A loop over fewer rows than stages has nothing to fill them with.
    """
    from repa_fast.kernels.adaln.triton_kernels import Tile

    if KERNELS[kernel][2]:
        grid = itertools.product(WARPS, STAGES, CHUNKS)
        return [(Tile(warps, stages), chunks) for warps, stages, chunks in grid]
    grid = itertools.product(WARPS, STAGES, ROWS)
    return [(Tile(warps, stages, rows), None) for warps, stages, rows in grid if stages <= rows]


def sweep(bench: Bench, kernel: str, problem: Problem, end: float) -> Iterator[Row]:
    """A row per point, until time.monotonic() is `end`."""
    op, setup, sums = KERNELS[kernel]
    device = bench.device
    expected = gate.expected(problem, problem.case.reference, device)
    mode = "backward" if kernel.endswith("backward") else "forward"
    nbytes = problem.necessary_bytes(mode)
    copy = bench.copy(nbytes)
    with timing.own_stream(device):
        binds = [
            setup(problem.make_inputs(seed, device), problem.make_upstream(seed, device))
            for seed in range(timing.sets_needed(nbytes, device))
        ]
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
    from repa_fast.kernels.adaln import triton_kernels

    # The number of programs per sample is a constant of the module, not of a tile.
    chosen = triton_kernels.CHUNKS if chunks is None else chunks
    with mock.patch.object(triton_kernels, "CHUNKS", chosen):
        bound = [bind(tile) for bind in binds]
    calls = [_call(launch, partials) for launch, partials, _ in bound]
    written = bound[0][2]
    for tensor in written.values():
        tensor.fill_(float("nan"))  # not what another tile has written
    totals = calls[0]()
    got = {**written, **(dict(zip(sums, totals.unbind(0))) if sums else {})}
    if "patches" in got:  # of cosines; their mean is torch's
        got = {"loss": -got["patches"][..., 0].mean(-1)}
    expected.compare(got)
    figure = timing.measure(calls, bench.device, bench.effort)
    return {
        "status": "ok",
        "ms_p20": figure.p20,
        "ms_p50": figure.p50,
        "ms_p80": figure.p80,
        "method": figure.method,
    }


def _call(launch: Any, partials: torch.Tensor | None) -> Callable[[], torch.Tensor | None]:
    """The launch, and the second stage of its sums where it has any."""
    from repa_fast.kernels.adaln.triton_kernels import sum_chunks

    def call() -> torch.Tensor | None:
        launch.run()
        return None if partials is None else sum_chunks(partials, BRANCH)

    return call


def table(rows: list[Row]) -> Table:
    """Of one kernel and problem, fastest first, what failed last."""
    result = Table(*HEADINGS)
    for row in sorted(rows, key=lambda row: row.get("ms_p50", float("inf"))):
        head = [str(row[name]) for name in ("warps", "stages", "rows", "chunks")]
        shape = "x".join(map(str, row["shape"]))
        failed = row["status"] != "ok"
        figures = (
            [row["message"], ""]
            if failed
            else [f"{row['ms_p50']:.4f}", f"{100 * row['share_of_copy']:.0f}"]
        )
        result.add_row(row["kernel"], shape, row["dtype"], *head, *figures)
    return result


def work(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Problem]]:
    """(kernel, problem): one dtype at a time, and of it the kernels in order of importance."""
    for dtype in (torch.float32, torch.bfloat16):
        for kernel in arguments.kernel or KERNELS:
            for problem in problems(KERNELS[kernel][0], device):
                if problem.dtype == dtype:
                    yield kernel, problem


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", action="append", choices=tuple(KERNELS), help="repeatable; all")
    parser.add_argument("--limit", type=float, default=150, help="seconds; begins nothing later")
    parser.add_argument("--out", type=Path, help="folder for tune.jsonl")
    return parser.parse_args(argv)


def run(bench: Bench, arguments: argparse.Namespace) -> int:
    """Sweep until the limit; 3 if the GPU was lost."""
    end = time.monotonic() + arguments.limit
    folder = arguments.out or results_folder("kernels")
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 120)
    with open(folder / "tune.jsonl", "a") as file:
        for kernel, problem in work(arguments, bench.device):
            if time.monotonic() > end:
                print(f"time limit: {kernel} at {problem.name} left out", flush=True)
                continue
            rows = []
            for row in sweep(bench, kernel, problem, end):
                file.write(json.dumps(row) + "\n")
                file.flush()
                rows.append(row)
                if row["status"] != "ok" and lost(bench.device):
                    return 3
            console.print(table(rows))
            bench.tidy()
    print(folder / "tune.jsonl")
    return 0


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if not torch.cuda.is_available():
        print("tuning needs a GPU: no CUDA device")
        return 0
    return run(Bench(torch.device("cuda"), timing.QUICK), arguments)


if __name__ == "__main__":
    sys.exit(main())
