"""Measure the project on a GPU: `python -m benchmarks.gpu --seconds 560 --out FOLDER`.

Items run in order of value, each a process with a limit of its own; one is begun only if it can end
in the time that is left, and passed over where this card has rows of it for the code as it is.
`python -m benchmarks.gpu.home FOLDER/gpu.tar.gz` brings the rows into the checkout.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu import table
from benchmarks.gpu.items import ITEMS, by_name
from benchmarks.gpu.pretended import report
from benchmarks.gpu.queue import PRETENDED, REPORT, Queue
from benchmarks.harness.environment import ROOT, device

RAN = ("ok", "has rows")
"""States of an item that ran to its end and was right."""
DEFAULT_OUT = ROOT / ".cache" / "gpu"


def chosen(arguments: argparse.Namespace) -> list:
    """Return the items that the flags ask for, in the queue's order."""
    wanted = by_name(arguments.only) if arguments.only else list(ITEMS)
    skipped = by_name(arguments.skip)
    return [item for item in wanted if item not in skipped]


def listing() -> str:
    """Return every item with its seconds and its command."""
    return "\n".join(
        f"{item.name:16}{item.seconds:5} s  python -m {' '.join(item.command)}" for item in ITEMS
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=560, help="for everything")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for gpu.tar.gz")
    parser.add_argument("--only", nargs="+", default=[], help="items; the order stays")
    parser.add_argument("--skip", nargs="+", default=[], help="items")
    parser.add_argument("--list", action="store_true", help="items, seconds, commands; then exit")
    parser.add_argument("--pretended", action="store_true", help="on a pretended card")
    return parser.parse_args(argv)


def ended_badly(rows: list[dict]) -> bool:
    """Return whether an item failed or was stopped."""
    return any(row["state"] in ("failed", "stopped") for row in rows)


def rehearsed(queue: Queue, rows: list[dict]) -> bool:
    """Print what a rehearsal found; whether an item did not run or a step is not as it must be.

    An item that no pretended card can run is left out rightly.
    """
    file, wrong = queue.work / REPORT, []
    if file.exists():
        print(report.table(file))
        wrong += report.verdicts(report.read(file))
    impossible = {item.name for item in ITEMS if item.unpretended}
    print("\n".join(["", "rehearsal:", *table.states(rows, queue.work / "logs"), *wrong]))
    missed = [row for row in rows if row["state"] not in RAN and row["item"] not in impossible]
    return bool(wrong or missed)


def main(argv: list[str] | None = None) -> int:
    """Run the queue and print the last table; 1 if an item failed or a rehearsal found an error."""
    arguments = parse(argv)
    if arguments.list:
        print(listing())
        return 0
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "inductor-gpu"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / ".cache" / "triton-gpu"))
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        card = PRETENDED if arguments.pretended else device()
        queue = Queue(arguments.seconds, arguments.out, Path(work), card)
        rows = queue.run(chosen(arguments))
        print(table.write(rows, queue.results, queue.work / "logs"))
        wrong = rehearsed(queue, rows) if queue.pretended else ended_badly(rows)
    print(f"gpu: {time.monotonic() - started:.0f} s, {arguments.out / 'gpu.tar.gz'}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
