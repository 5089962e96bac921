"""Kernel measurements: `python -m benchmarks.kernels.run [--list] [--op adaln] [--provider ours]`.

Every provider of an op first has to be right; then it is timed, on a GPU at the shapes of SiT-XL/2
with cold caches, on a CPU at a small shape to see that it runs. Rows are appended to rows.jsonl as
they come; report.md and shares.png beside it are made from all rows there.
"""

import argparse
import sys
import time
from collections.abc import Iterator

import torch

from benchmarks.harness import timing
from benchmarks.harness.environment import parser, results_folder
from benchmarks.harness.rows import append
from benchmarks.kernels import report
from benchmarks.kernels.measure import Bench, Row
from benchmarks.kernels.ops import CASES, MODES, Problem, problems, short
from benchmarks.kernels.providers import Provider, providers

OVERHEAD = "overhead"
DTYPES = ("bf16", "fp32")


def listing(where: str) -> str:
    """List every op with its providers, each available on this type of device or why not."""
    lines = []
    for op in CASES:
        lines.append(op)
        for name, provider in providers(op).items():
            note = f" ({provider.note})" if provider.note else ""
            lines.append(f"  {name}: {provider.why_not(where) or 'available'}{note}")
    return "\n".join(lines)


def rows(bench: Bench, arguments: argparse.Namespace) -> Iterator[Row]:
    """Measure what the arguments ask for: times of all ops, then host times, until the limit."""
    end = time.monotonic() + arguments.limit
    modes = arguments.mode or [*MODES, OVERHEAD]
    ops = {op: chosen_problems(op, bench.device, arguments) for op in arguments.op or CASES}

    def in_time(op: str, what: str) -> Iterator[Provider]:
        for name, provider in providers(op).items():
            if arguments.provider and name not in arguments.provider:
                continue
            if time.monotonic() <= end:
                yield provider
            else:
                print(f"time limit: {what.format(name)} left out", flush=True)

    for op, found in ops.items():
        wanted = tuple(mode for mode in CASES[op].modes if mode in modes)
        if not found:
            print(f"{op}: no shape of this batch size and dtype", flush=True)
        for problem in found if wanted else ():
            for provider in in_time(op, f"{problem.name} {{}}"):
                yield from bench.rows(problem, provider, wanted)
    for op, found in ops.items():
        for problem in found[:1] if OVERHEAD in modes else ():
            for provider in in_time(op, f"{op} {{}} {OVERHEAD}"):
                yield bench.overhead(op, provider, problem)


def chosen_problems(op: str, device: torch.device, arguments: argparse.Namespace) -> list[Problem]:
    """Return the problems of an op with a batch size and a dtype that the arguments ask for."""
    return [
        problem
        for problem in problems(op, device)
        if (not arguments.batch or problem.shape[0] in arguments.batch)
        and (not arguments.dtype or short(problem.dtype) in arguments.dtype)
    ]


def line(row: Row) -> str:
    """Return a row as it passes."""
    head = f"{row['op']} {report.shape_of(row)} {row['dtype']} {row['mode']} {row['provider']}"
    if row["status"] != "ok":
        return f"{head}: {row['status']}, {row['message']}"
    if "host_us_p50" in row:
        return f"{head}: {row['host_us_p50']:.1f} us of host time"
    share = f"{100 * row['share_of_copy']:.0f} % of copy"
    return f"{head}: {row['ms_p50']:.4f} ms, {share}, {row['method']}"


def lost(where: torch.device) -> bool:
    """Say whether the GPU has failed under this process, so that nothing more can run on it."""
    if where.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(where)
    except Exception as error:
        print(f"the device is lost: {error}".splitlines()[0], flush=True)
        return True
    return False


def parse(argv: list[str] | None) -> argparse.Namespace:
    names = sorted({name for op in CASES for name in providers(op)})
    flags = parser(__doc__)
    flags.add_argument("--list", action="store_true", help="ops and providers, then exit")
    choices = {"op": tuple(CASES), "provider": names, "mode": (*MODES, OVERHEAD), "dtype": DTYPES}
    for name, known in choices.items():
        flags.add_argument(f"--{name}", action="append", choices=known, help="repeatable; all")
    text = "shapes of these batch sizes only"
    flags.add_argument("--batch", type=int, nargs="+", metavar="N", help=text)
    flags.add_argument("--quick", action="store_true", help="fewer rounds")
    flags.add_argument("--limit", type=float, default=1e9, help="seconds; begins nothing later")
    return flags.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure; return 1 if a kernel of this project failed or was wrong, 3 if the GPU was lost."""
    arguments = parse(argv)
    where = torch.device(arguments.device)
    if arguments.list:
        print(listing(where.type))
        return 0
    effort = timing.ON_CPU
    if where.type == "cuda":
        effort = timing.QUICK if arguments.quick else timing.Effort()
    folder = arguments.out or results_folder("kernels", where.type)
    file = folder / "rows.jsonl"
    append(file)
    status, measured = 0, []
    for row in rows(Bench(where, effort), arguments):
        print(line(row), flush=True)
        append(file, row)
        measured.append(row)
        if row["status"] == "failed":
            status = 1 if row["provider"] == "ours" else status
            if lost(where):
                status = 3
                break
    report.write(folder, report.read(file))
    print(report.table(measured))
    print(folder)
    return status


if __name__ == "__main__":
    sys.exit(main())
