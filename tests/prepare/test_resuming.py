"""Builds and extractions of features that are cut off anywhere, and what other processes find."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repa_fast import ledger
from repa_fast.data.dataset import LatentDataset
from tests.prepare import building, extracting
from tests.refusals import refused

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=[building, extracting], ids=["build", "extract"])
def work(request):
    return request.param


@pytest.fixture(scope="module")
def whole(work, tmp_path_factory):
    """A folder whose work was done by one process in one go."""
    out = tmp_path_factory.mktemp("whole")
    work.begin(out)
    assert work.run(out) == 45
    return out


@pytest.fixture
def out(work, tmp_path):
    """A folder whose work is to be done."""
    work.begin(tmp_path)
    return tmp_path


class Cut(Exception):
    pass


def cut(*arguments, **options):
    raise Cut


def assert_gone_on_with(work, out, whole):
    assert work.untouched(out)
    assert work.run(out) == 45
    assert work.content(out) == work.content(whole)
    table = LatentDataset(out).table
    used = {file.path for fragment in table.get_fragments() for file in fragment.metadata.files}
    assert {path.name for path in (out / "train.lance" / "data").iterdir()} == used


@pytest.mark.parametrize("unit", [0, 3, 7])
@pytest.mark.parametrize("moment", ["encoding", "record", "commit"])
def test_cut_off_in_a_unit_it_goes_on_without_duplicates_or_holes(
    work, whole, out, monkeypatch, moment, unit
):
    encode, write, calls = work.encode, ledger.Ledger.write, []

    def encode_until(images):  # twice in each unit but the last one, which has half the rows
        calls.append(images)
        return cut() if len(calls) == min(2 * unit + 2, 15) else encode(images)

    def write_until(written, number, record):
        return cut() if number == unit else write(written, number, record)

    with monkeypatch.context() as patch:
        if moment == "encoding":
            patch.setattr(work, "encode", encode_until)
        elif moment == "record":
            patch.setattr(ledger.Ledger, "write", write_until)
        else:
            patch.setattr(work.WORK, "commit", cut)
        with pytest.raises(Cut):
            work.run(out)
    assert len(list((out / work.FOLDER).glob("0*.json"))) == (8 if moment == "commit" else unit)
    assert_gone_on_with(work, out, whole)


def test_cut_off_after_the_commit_it_is_whole_and_says_so(work, whole, out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ledger.Ledger, "remove", cut)
        with pytest.raises(Cut):
            work.run(out)
    refused(lambda: work.run(out), work.TAKEN)
    assert work.content(out) == work.content(whole)


def start(work, out, rows, seconds):
    """Work as a process; encoding a batch takes so many seconds."""
    command = [sys.executable, "-m", work.__name__, str(out), str(rows)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ENCODE_SECONDS": str(seconds)}
    return subprocess.Popen(command, cwd=ROOT, env=env)


@pytest.mark.usefixtures("heavy")
def test_killed_at_random_moments_and_gone_on_with(work, tmp_path):
    rows, kills, done, generator = 120, 4, 0, random.Random(0)
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
        work.begin(tmp_path / name, rows)
    killed = tmp_path / "killed"

    def finished():
        return len(list(killed.glob(f"{work.FOLDER}/[0-9]*.json")))

    for _ in range(kills):
        process = start(work, killed, rows, 0.1)
        deadline = time.monotonic() + 120
        while finished() <= done:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.4))  # within one of the next units, of 0.2 s each
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = finished()
    assert kills <= done < rows // 6
    for name in ("killed", "whole"):
        assert work.run(tmp_path / name, rows) == rows
    assert work.content(killed) == work.content(tmp_path / "whole")
    work.verify(killed)


def shared(world, work, out):
    return sys.modules[work].run(out, rank=world.rank, world_size=world.size)


def test_processes_together_make_what_one_makes(work, whole, out, ranks):
    assert ranks(shared, work.__name__, out) == [45, None]
    assert work.content(out) == work.content(whole)


def test_a_share_is_kept_and_a_late_process_has_nothing_to_do(work, whole, out):
    for rank in (1, 2):
        assert work.run(out, rank=rank, world_size=3) is None
    units = [path.name for path in (out / work.FOLDER).glob("0*.json")]
    assert sorted(units) == [f"{unit:06d}.json" for unit in (1, 2, 4, 5, 7)]
    assert work.run(out, rank=0, world_size=3) == 45
    assert work.content(out) == work.content(whole)
    assert work.run(out, rank=1, world_size=3) is None
    assert sorted(path.name for path in out.iterdir()) == sorted([work.CHECKS, "train.lance"])


def test_what_is_finished_is_the_table_and_its_checksums_and_is_not_overwritten(work, whole):
    before = work.content(whole)
    refused(lambda: work.run(whole), work.TAKEN)
    assert work.content(whole) == before
    assert sorted(path.name for path in whole.iterdir()) == sorted([work.CHECKS, "train.lance"])
    checks = json.loads((whole / work.CHECKS).read_text())
    assert [check["rows"] for check in checks] == [6] * 7 + [3]


def test_another_recipe_than_the_one_begun_is_refused(work, out):
    work.run(out, rank=1, world_size=3)
    changes, words = work.ANOTHER
    refused(lambda: work.run(out, **changes), f"begun with another recipe .*{words}")


def test_a_full_disk_keeps_what_is_written(work, whole, out, monkeypatch):
    write, units = work.WORK.write, []

    def write_until(self, unit):
        units.append(unit)
        if len(units) == 5:
            raise OSError("LanceError(IO): No space left on device (os error 28)")
        write(self, unit)

    monkeypatch.setattr(work.WORK, "write", write_until)
    words = f"is full; 4 {work.KEPT} are written and kept"
    refused(lambda: work.run(out), words, error=RuntimeError)
    assert_gone_on_with(work, out, whole)
    assert units == [0, 1, 2, 3, 4, 4, 5, 6, 7]


def test_verify_reads_everything_and_finds_a_changed_byte_and_a_missing_row(work, out):
    work.run(out)
    seen, record = [], out / work.CHECKS
    work.verify(out, seen.append)
    assert seen == sorted(seen) and seen[-1] == 45
    checks = json.loads(record.read_text())
    checks[2]["crc32"] ^= 1
    record.write_text(json.dumps(checks))
    refused(lambda: work.verify(out), work.WRONG)
    checks[5]["rows"] += 1
    record.write_text(json.dumps(checks))
    refused(lambda: work.verify(out), "has 45 rows, expected 46")
    record.unlink()
    refused(lambda: work.verify(out), f"{work.CHECKS} is missing")
