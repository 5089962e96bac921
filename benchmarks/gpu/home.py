"""Bring measured rows into the checkout: `python -m benchmarks.gpu.home gpu.tar.gz`.

Rows are appended to benchmarks/results/<card>/<date>_<name>/rows.jsonl, unless they are there, and
the reports beside them are written anew; so are the tables of docs/performance.md. What a pretended
card "measured" is refused: its numbers mean nothing.
"""

import argparse
import json
import sys
import tarfile
import tempfile
from pathlib import Path

from benchmarks.gpu import table
from benchmarks.gpu.queue import QUEUE
from benchmarks.harness.environment import RESULTS
from benchmarks.kernels import report
from benchmarks.paper import roofline
from benchmarks.sample import report as sample_report
from benchmarks.step import report as step_report
from benchmarks.step import sra

REPORTS = {
    "ladder": step_report.write,
    "step": step_report.write,
    "kernels": lambda folder: report.write(folder, report.read(folder / "rows.jsonl")),
    "sample": sample_report.rewrite,
    "sra": sra.rewrite,
}
"""The end of a folder's name -> what writes the report of its rows."""


def append(source: Path, target: Path) -> int:
    """Append the lines of `source` that `target` does not have; how many they were."""
    target.parent.mkdir(parents=True, exist_ok=True)
    there = set(target.read_text().splitlines()) if target.exists() else set()
    new = [line for line in source.read_text().splitlines() if line not in there]
    with open(target, "a") as file:
        file.writelines(f"{line}\n" for line in new)
    return len(new)


def cards(folder: Path) -> set[str]:
    """Return the names of the cards that rows under a folder were measured on."""
    files = [*folder.glob("**/rows.jsonl"), *folder.glob(f"**/{QUEUE}")]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {row["device"] for row in rows}


def bring(tar: Path, into: Path) -> list[str]:
    """Unpack `tar` into a folder of results; a line for each file that rows were added to.

    Raises:
        ValueError: rows of a pretended card that would go among the measured ones.
    """
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(tar) as file:
            file.extractall(folder, filter="data")
        found = Path(folder)
        pretended = [card for card in cards(found) if "pretended" in card]
        if pretended and into == RESULTS:
            raise ValueError(f"{tar} has rows of {', '.join(pretended)}, expected a real card's")
        for rows in sorted((found / "results").glob("*/*/rows.jsonl")):
            target = into / rows.relative_to(found / "results")
            lines.append(f"{target}: {append(rows, target)} rows")
            kind = target.parent.name.split("_", 1)[1]
            REPORTS.get(kind, lambda folder: None)(target.parent)
        if (found / QUEUE).exists():
            lines.append(bring_queue(found, into))
    return lines


def bring_queue(found: Path, into: Path) -> str:
    """Keep the states of the items and the table of the run; a line about it."""
    rows = [json.loads(line) for line in (found / QUEUE).read_text().splitlines()]
    card = rows[-1]["device"].lower().replace(" ", "-")
    folder = into / card / f"{rows[-1]['date']}_gpu"
    count = append(found / QUEUE, folder / QUEUE)
    text = table.write(rows, found / "results", found / "logs")
    with open(folder / "tables.txt", "a") as file:
        file.write(f"{text}\n\n")
    return f"{folder / QUEUE}: {count} items"


def main(argv: list[str] | None = None) -> int:
    """Bring a file home; 1 where it is refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tar", type=Path)
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder of results")
    arguments = parser.parse_args(argv)
    try:
        print("\n".join(bring(arguments.tar, arguments.into)))
    except ValueError as error:
        print(error)
        return 1
    if arguments.into == RESULTS:
        return roofline.main(["--write"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
