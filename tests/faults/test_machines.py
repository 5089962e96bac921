"""Disks, data and numbers that fail: real ones, each in a process of its own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.faults import chaos
from tests.launching import ROOT
from tests.train.parallel_ranks import FSDP, SRA, unequal, with_a_nan

NAMESPACE = ("unshare", "-rm")


def run(*arguments: str | Path, timeout: float = 240):
    """A process in the repository's root."""
    options = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "timeout": timeout}
    return subprocess.run(list(map(str, arguments)), capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def disk(digits_dir, tmp_path_factory):
    """What disk_faults found on a tmpfs of its own."""
    folder, trial = (tmp_path_factory.mktemp(name) for name in ("disk", "trial"))
    mount = (*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", trial)
    if shutil.which(NAMESPACE[0]) is None or run(*mount).returncode:
        pytest.skip("needs a mount namespace of its own, which `unshare -rm` cannot make here")
    process = run(*NAMESPACE, sys.executable, "-m", "tests.faults.disk_faults", digits_dir, folder)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.usefixtures("heavy")
def test_a_full_disk_stops_the_run_and_loses_nothing(disk):
    assert re.search(r"No space left on device|GiB free", disk["full"])
    assert disk["left"] == [5]
    assert disk["freed"] == "" and disk["differences"] == []


@pytest.mark.usefixtures("heavy")
def test_a_read_only_folder_is_named_in_one_line(disk):
    words = r"repa-fast: .*Read-only file system: '.*/other.*'\n"
    assert re.fullmatch(words, disk["read-only"])
    assert "Read-only file system" in disk["finished, read-only"]


@pytest.mark.parametrize("mode", [{}, FSDP], ids=["ddp", "fsdp"])
def test_a_nan_on_one_process_is_skipped_by_both(ranks, mode):
    """And the alignment's end, after it, is one for both."""
    for found in ranks(with_a_nan, SRA | mode):
        before, after, last = found["tensors"]
        assert unequal(after, before) == []
        assert any(name.startswith("model.") for name in unequal(last, after))
        assert [reading["skipped"] for reading in found["readings"]] == [0, 1, 0]
        assert found["readings"][1]["loss"] is None
        assert (found["step"], found["bad_run"]) == (3, 0)
        assert torch.equal(found["heads"][2], found["heads"][1])  # it trains no longer


HANGS = """
import sys, time
from repa_fast.cli import main
from repa_fast.data import official

read, hangs = official.read_regular, sys.argv.pop(1)
official.read_regular = lambda path: time.sleep(600) if str(path) == hangs else read(path)
sys.exit(main(["train", *sys.argv[1:]]))
"""
"""A training run in which reading one file takes ten minutes, as from a disk that is gone."""


@pytest.mark.usefixtures("heavy")
def test_a_source_that_hangs_ends_the_run_within_the_limit(tmp_path):
    folder = tmp_path / "official"
    latents = [f"00000/img-mean-std-{number:08d}.npy" for number in range(40)]
    (folder / "vae-sd" / "00000").mkdir(parents=True)
    for latent in latents:
        np.save(folder / "vae-sd" / latent, np.zeros((8, 4, 4), np.float32))
    labels = json.dumps({"labels": [[latent, 0] for latent in latents]})
    (folder / "vae-sd" / "dataset.json").write_text(labels)
    place = ("--output-dir", tmp_path, "--exp-name", "run", "--resolution", "32")
    flags = (*chaos.flags(folder, 100, 50, 2), *place, "--patch-size", "2", "--data-timeout", "2")
    hangs = folder / "vae-sd" / latents[7]
    process = run(sys.executable, "-c", HANGS, hangs, *flags, timeout=90)
    assert process.returncode == 1
    assert re.search(r"repa-fast: no batch from .*official.* within 2 s", process.stderr)
