"""Generating as a process that can be killed, and ends at chosen moments."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from repa_fast import ledger
from repa_fast.eval import generate as generating
from repa_fast.eval.generate import GenerateConfig
from repa_fast.eval.reference import write_npz

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


def start(config: GenerateConfig, rank: int = 0, world_size: int = 1) -> subprocess.Popen:
    """`python -m repa_fast.eval.generate` as torchrun starts it."""
    command = [sys.executable, "-m", "repa_fast.eval.generate", *arguments(config)]
    env = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank),
    }  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def records(folder: Path) -> int:
    """Finished blocks of the work in a folder."""
    return len(list(folder.glob(".*.generating/[0-9]*.json")))


def killed(config: GenerateConfig, after: int, pause: float) -> None:
    """Start, and kill so many seconds after so many blocks are finished."""
    process = start(config)
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
    assert out.name == expected.name
    with np.load(out) as got, np.load(expected) as wanted:
        assert sorted(got.files) == sorted(wanted.files) == ["arr_0", "arr_1"]
        for name in got.files:
            assert np.array_equal(got[name], wanted[name])
    assert out.read_bytes() == expected.read_bytes()
    left = sorted(path.suffix for path in out.parent.iterdir())
    assert left == [".json", ".npz", ".png"]


class Cut(Exception):
    """The end of a process at a moment that a test chooses."""


def cut(*arguments, **options):
    raise Cut


def cut_at(monkeypatch, moment: str) -> None:
    """Let the process end at that moment."""
    if moment == "sampling":
        sample_block = generating.sample_block
        monkeypatch.setattr(
            generating,
            "sample_block",
            lambda *all: cut() if all[2] == 1 else sample_block(*all),
        )
    elif moment in ("block written, no record", "removing"):
        name = {"removing": "remove"}.get(moment, "write")
        monkeypatch.setattr(ledger.Ledger, name, cut)
    elif moment == "sheet":
        monkeypatch.setattr(generating, "save_png", cut)
    elif moment == "json":
        write_whole = generating.write_whole
        monkeypatch.setattr(
            generating,
            "write_whole",
            lambda path, text: cut() if "n-20.json" in path.name else write_whole(path, text),
        )
    elif moment == "joining":

        def first_two(out, parts, *others, **arrays):
            first = (part if number < 2 else cut() for number, part in enumerate(parts))
            return write_npz(out, first, *others, **arrays)

        monkeypatch.setattr(generating, "write_npz", first_two)
    elif moment == "naming":
        replace = Path.replace
        monkeypatch.setattr(
            Path,
            "replace",
            lambda path, target: cut() if target.suffix == ".npz" else replace(path, target),
        )
