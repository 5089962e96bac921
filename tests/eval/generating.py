"""Generating as a process that can be killed, and ends at chosen moments."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from repa_fast.distributed import World
from repa_fast.eval import generate as generating
from repa_fast.eval.generate import GenerateConfig
from repa_fast.ledger import Ledger

ROOT = Path(__file__).parents[2]
COUNT, BATCH = 20, 8  # blocks of 8, 8 and 4
SETTINGS = {"num_fid_samples": COUNT, "per_proc_batch_size": BATCH, "num_steps": 2}


def config_of(run: Path, folder: Path, **settings) -> GenerateConfig:
    """To make the images of a run in a folder."""
    given = {"ckpt": str(run), "sample_dir": str(folder)} | SETTINGS | settings
    return GenerateConfig(**given)


def arguments(config: GenerateConfig) -> list[str]:
    """The command line of a config."""
    flags = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            flags += [f"--{field.name.replace('_', '-')}", str(value)]
    return flags


def in_world(world: World, config: GenerateConfig) -> Path:
    """As one of the processes of `ranks`."""
    return generating.generate(config)


def records(folder: Path) -> int:
    """Finished blocks of the work in a folder."""
    return len(list(folder.glob(".*.generating/[0-9]*.json")))


def killed(config: GenerateConfig, after: int, pause: float) -> None:
    """Start `python -m repa_fast.eval.generate`; kill it so long after so many blocks are there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "repa_fast.eval.generate", *arguments(config)], cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while records(Path(config.sample_dir)) < after:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(pause)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()


def assert_same(out: Path, expected: Path) -> None:
    """The same file, byte by byte, and nothing but what belongs beside it."""
    assert out.name == expected.name and out.read_bytes() == expected.read_bytes()
    left = sorted(path.suffix for path in out.parent.iterdir())
    assert left == [".json", ".npz", ".png"]


class Cut(Exception):
    """The end of a process at a moment that a test chooses."""


def cut(*arguments, **options):
    raise Cut


def is_last_of_joined(block: Path) -> bool:
    return block.stem == "000002" and any(block.parents[1].glob("*.partial"))


MOMENTS = {
    "sampling": (generating, "sample_block", lambda sampler, config, block: block == 1),
    "block written, no record": (Ledger, "write", None),
    "sheet": (generating, "save_png", None),
    "json": (generating, "write_whole", lambda path, text: "n-20.json" in path.name),
    "joining": (np, "load", is_last_of_joined),
    "naming": (Path, "replace", lambda path, target: target.suffix == ".npz"),
    "removing": (Ledger, "remove", None),
}
"""Where a process may end: (owner, function, at which of its calls; at the first if None)."""


def cut_at(monkeypatch, moment: str) -> None:
    """Let the process end at that moment."""
    owner, name, is_then = MOMENTS[moment]
    original = getattr(owner, name)

    def call(*arguments, **options):
        if is_then is None or is_then(*arguments):
            raise Cut
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, call)
