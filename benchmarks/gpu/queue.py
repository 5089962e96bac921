"""Runs items one after the other within a number of seconds, and packs up after each.

Everything is written into a working folder: a log for each item, the rows that the benchmarks
append (REPA_FAST_RESULTS), and queue.jsonl, a line for each item. After every item the whole of it
is packed into one file, `gpu.tar.gz`, so that what ended is safe whatever comes next.
"""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.items import Item, missing
from benchmarks.harness.environment import RESULTS, ROOT, stamp

TAR = "gpu.tar.gz"
QUEUE = "queue.jsonl"
REPORT = "rehearsal.jsonl"
"""What a rehearsal finds out about the steps that it takes."""
PRETENDED, PATIENCE = "pretended", 10
"""The card of a rehearsal, and how many times as long an item may take there, on a few cores."""
DONE = ("ok", "failed")
"""States of items that ran to their end."""
KEEP = 5.0
"""Seconds that are kept for packing and the last table."""
STOPS = "card"
"""The item without which nothing is measured."""


class Queue:
    """Items, the seconds they have together, and where their results go.

    Args:
        seconds: for all items.
        out: folder that TAR is written into; one that is there already is gone on from.
        work: folder for logs and rows.
        card: its name, which rows of an item have to have for the item to be passed over; PRETENDED
            is the card of a rehearsal.
    """

    def __init__(self, seconds: float, out: Path, work: Path, card: str) -> None:
        self.end = time.monotonic() + seconds
        self.out, self.work, self.card = out, work, card
        self.results = work / "results"
        for folder in (out, self.results, work / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        if (out / TAR).exists():
            with tarfile.open(out / TAR) as tar:
                tar.extractall(work, filter="data")

    def left(self) -> float:
        """Return the seconds that are left for items."""
        return self.end - time.monotonic() - KEEP

    def run(self, items: Sequence[Item]) -> list[dict]:
        """Run what is not there yet, as far as the time goes; a row for each item."""
        rows = []
        for item in items:
            row = self.one(item)
            rows.append(row)
            why = f" ({row['message']})" if "message" in row else ""
            print(f"gpu: {item.name}: {row['state']}, {row['seconds']:.0f} s{why}", flush=True)
            if row["state"] in (*DONE, "stopped"):
                with open(self.work / QUEUE, "a") as file:
                    file.write(json.dumps(row) + "\n")
            self.pack()
            if item.name == STOPS and row["state"] == "failed":
                print((self.work / "logs" / f"{item.name}.log").read_text()[-2000:])
                break
        return rows

    def one(self, item: Item) -> dict:
        """Run an item unless it has rows, lacks something or no time is left; its row."""
        row = {"item": item.name, "key": item.key, "seconds": 0.0, **stamp(), "device": self.card}
        lacking = missing(item, os.environ, self.pretended)
        if any(self.measured(item)):
            return {**row, "state": "has rows"}
        if lacking:
            return {**row, "state": "left out", "message": lacking}
        if self.left() < item.seconds:
            return {**row, "state": "no time"}
        before = time.monotonic()
        patience = PATIENCE if self.pretended else 1
        state = self.process(item, min(patience * item.most, self.left()))
        return {**row, "state": state, "seconds": time.monotonic() - before}

    @property
    def pretended(self) -> bool:
        """Whether this is a rehearsal."""
        return self.card == PRETENDED

    def measured(self, item: Item) -> list[dict]:
        """Return the rows that this card has of the item as it is now, here or in the checkout."""
        files = [self.work / QUEUE, *RESULTS.glob(f"*/*/{QUEUE}")]
        rows = [
            json.loads(line)
            for file in files
            if file.exists()
            for line in file.read_text().splitlines()
        ]
        wanted = {"key": item.key, "state": "ok", "device": self.card}
        return [row for row in rows if all(row.get(name) == wanted[name] for name in wanted)]

    def process(self, item: Item, seconds: float) -> str:
        """Run an item's process; its state."""
        environment = {**os.environ, "REPA_FAST_RESULTS": str(self.results)}
        environment.setdefault("PYTHONUNBUFFERED", "1")
        command = [sys.executable, "-m", "benchmarks.gpu.process", *item.command]
        if self.pretended:
            command[2:3] = ["benchmarks.gpu.pretended", "-m"]
            environment["PRETENDED_REPORT"] = str(self.work / REPORT)
            environment["PYTEST_ADDOPTS"] = "-p benchmarks.gpu.pretended.plugin"
        with open(self.work / "logs" / f"{item.name}.log", "w") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                log.write(f"\nstopped after {seconds:.0f} s\n")
                return "stopped"
        return "ok" if status == 0 else "failed"

    def pack(self) -> None:
        """Write TAR anew, in one rename."""
        new = self.out / f"{TAR}.new"
        with tarfile.open(new, "w:gz") as tar:
            for name in ("logs", "results", QUEUE, REPORT):
                if (self.work / name).exists():
                    tar.add(self.work / name, name)
        new.replace(self.out / TAR)
