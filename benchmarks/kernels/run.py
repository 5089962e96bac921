"""Kernel measurements: `python -m benchmarks.kernels.run [--list] [--op adaln] [--provider ours]`.

Every provider of an op first has to be right; then it is timed, on a GPU at the shapes of SiT-XL/2
with cold caches, on a CPU at a small shape to see that it runs. Rows are appended to rows.jsonl as
they come; report.md and shares.png beside it are made from all rows there.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.harness import timing
from benchmarks.harness.environment import results_folder
from benchmarks.kernels import report
from benchmarks.kernels.measure import Bench, Row
from benchmarks.kernels.ops import CASES, MODES, Problem, problems, short
from benchmarks.kernels.providers import providers

OVERHEAD = "overhead"
DTYPES = ("bf16", "fp32")


def listing(where: str) -> str:
    """Every op with its providers, each available on this type of device or why not."""
    lines = []
    for op in CASES:
        lines.append(op)
        for name, provider in providers(op).items():
            note = f" ({provider.note})" if provider.note else ""
            lines.append(f"  {name}: {provider.why_not(where) or 'available'}{note}")
    return "\n".join(lines)


def rows(bench: Bench, arguments: argparse.Namespace) -> Iterator[Row]:
    """What the arguments ask for: times of all ops, then host times; stops at the time limit."""
    end = time.monotonic() + arguments.limit
    modes = arguments.mode or [*MODES, OVERHEAD]
    for op in arguments.op or CASES:
        wanted = tuple(mode for mode in CASES[op].modes if mode in modes)
        found = chosen_problems(op, bench.device, arguments)
        if not found:
            print(f"{op}: no shape of this batch size and dtype", flush=True)
        for problem in found if wanted else ():
            for provider in chosen(op, arguments):
                if time.monotonic() > end:
                    print(f"time limit: {problem.name} {provider.name} left out", flush=True)
                    continue
                yield from bench.rows(problem, provider, wanted)
    for op in arguments.op or CASES:
        at = chosen_problems(op, bench.device, arguments)[:1] if OVERHEAD in modes else []
        for provider in chosen(op, arguments) if at else ():
            if time.monotonic() > end:
                print(f"time limit: {op} {provider.name} {OVERHEAD} left out", flush=True)
                continue
            yield bench.overhead(op, provider, at[0])


def chosen_problems(op: str, device: torch.device, arguments: argparse.Namespace) -> list[Problem]:
    """Problems of an op with a batch size and a dtype that the arguments ask for."""
    return [
        problem
        for problem in problems(op, device)
        if (not arguments.batch or problem.shape[0] in arguments.batch)
        and (not arguments.dtype or short(problem.dtype) in arguments.dtype)
    ]


def chosen(op: str, arguments: argparse.Namespace) -> list:
    """Providers of an op that the arguments ask for."""
    table = providers(op).items()
    return [provider for name, provider in table if name in (arguments.provider or dict(table))]


def line(row: Row) -> str:
    """A row as it passes."""
    head = f"{row['op']} {report.shape_of(row)} {row['dtype']} {row['mode']} {row['provider']}"
    if row["status"] != "ok":
        return f"{head}: {row['status']}, {row['message']}"
    if "host_us_p50" in row:
        return f"{head}: {row['host_us_p50']:.1f} us of host time"
    share = f"{100 * row['share_of_copy']:.0f} % of copy"
    return f"{head}: {row['ms_p50']:.4f} ms, {share}, {row['method']}"


def lost(where: torch.device) -> bool:
    """Whether the GPU has failed under this process, so that nothing more can run on it."""
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="ops and providers, then exit")
    parser.add_argument("--op", action="append", choices=tuple(CASES), help="repeatable; all")
    parser.add_argument("--provider", action="append", choices=names, help="repeatable; all")
    parser.add_argument(
        "--mode", action="append", choices=(*MODES, OVERHEAD), help="repeatable; all"
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", metavar="N", help="shapes of these batch sizes only"
    )
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeatable; all")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds; begins nothing later")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for rows, report and picture")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure; 1 if a kernel of this project failed or was wrong, 3 if the GPU was lost."""
    arguments = parse(argv)
    where = torch.device(arguments.device)
    if arguments.list:
        print(listing(where.type))
        return 0
    if where.type == "cuda":
        effort = timing.QUICK if arguments.quick else timing.Effort()
    else:
        effort = timing.ON_CPU
    folder = arguments.out or results_folder("kernels", where.type)
    folder.mkdir(parents=True, exist_ok=True)
    status, measured = 0, []
    with open(folder / "rows.jsonl", "a") as file:
        for row in rows(Bench(where, effort), arguments):
            print(line(row), flush=True)
            file.write(json.dumps(row) + "\n")
            file.flush()
            measured.append(row)
            if row["status"] == "failed":
                status = 1 if row["provider"] == "ours" else status
                if lost(where):
                    status = 3
                    break
    report.write(folder, report.read(folder / "rows.jsonl"))
    Console(width=None if sys.stdout.isatty() else 120).print(report.table(measured))
    print(folder)
    return status


if __name__ == "__main__":
    sys.exit(main())
