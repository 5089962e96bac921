import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from repa_fast import ledger
from repa_fast.data.dataset import LatentDataset
from repa_fast.data.loader import Loader, read_batch
from repa_fast.data.order import SampleOrder
from repa_fast.prepare import features as extract
from tests.prepare.extracting import column, encode, pixels_of, run, write

ROOT = Path(__file__).parents[2]


def expected(rows=45):
    images = pixels_of(rows).transpose(0, 3, 1, 2)
    padded = np.concatenate([images, images[: -rows % 4]])
    parts = [encode(padded[i : i + 4]) for i in range(0, len(padded), 4)]
    return torch.cat(parts)[:rows]


def stored(out, name="made_up"):
    dataset = LatentDataset(out)
    batch = read_batch(dataset, np.arange(len(dataset)), images=False, features=[name])
    return dataset.features[name].unpack(batch)


def data_files(out):
    return sorted(path.name for path in (out / "train.lance" / "data").iterdir())


@pytest.fixture
def table(tmp_path):
    write(tmp_path)
    return tmp_path


def test_the_column_holds_each_image_s_features(table):
    before = LatentDataset(table)
    rows = before.rows(np.arange(45))
    assert run(table)
    assert torch.equal(stored(table), expected().half())
    after = LatentDataset(table)
    assert after.features == {"made_up": column()} and before.features == {}
    assert after.metadata == before.metadata
    again = after.rows(np.arange(45))
    assert again["image"] == rows["image"]
    assert np.array_equal(again["moments"], rows["moments"])
    assert sorted(p.name for p in table.iterdir()) == ["train.lance", "train.made_up.json"]


def test_a_second_column_and_one_that_was_dropped(table):
    run(table)
    run(table, name="small", storage="int8")
    LatentDataset(table).table.drop_columns(["made_up"])
    with pytest.raises(ValueError, match="no column of features 'made_up', expected one of: small"):
        stored(table)
    run(table, name="again")
    level = expected().abs().amax(-1, keepdim=True) / 127
    assert ((stored(table, "small") - expected()).abs() <= level * 0.501).all()
    assert torch.equal(stored(table, "again"), expected().half())


def test_two_processes_equal_one(table, tmp_path_factory):
    whole = tmp_path_factory.mktemp("whole")
    write(whole)
    run(whole)
    assert not run(table, rank=1, world_size=2)
    assert run(table, rank=0, world_size=2)
    assert torch.equal(stored(table), stored(whole))
    checks = [(out / "train.made_up.json").read_text() for out in (table, whole)]
    assert checks[0] == checks[1]
    assert not run(table, rank=1, world_size=2)  # late: the first has committed
    assert not list(table.glob(".*.features"))


@pytest.mark.parametrize("moment", ["columns", "record", "commit", "cleaning"])
def test_cut_off_and_gone_on_with(table, monkeypatch, moment):
    class Cut(Exception):
        pass

    def cut(*arguments, **options):
        raise Cut

    def second(function):
        calls = iter((function, cut))
        return lambda *arguments, **options: next(calls)(*arguments, **options)

    with monkeypatch.context() as patch:
        if moment == "columns":
            patch.setattr(extract, "_record_batch", second(extract._record_batch))
        elif moment == "record":
            patch.setattr(ledger.Ledger, "write", second(ledger.Ledger.write))
        elif moment == "commit":
            patch.setattr(extract.Extraction, "commit", cut)
        else:
            patch.setattr(ledger.Ledger, "remove", cut)
        with pytest.raises(Cut):
            run(table)
    if moment == "cleaning":  # the table is whole, and says so
        with pytest.raises(ValueError, match="made_up already"):
            run(table)
    else:
        assert LatentDataset(table).features == {}
        run(table)
    assert torch.equal(stored(table), expected().half())
    if moment != "cleaning":
        fragments = LatentDataset(table).table.get_fragments()
        used = {file.path for fragment in fragments for file in fragment.metadata.files}
        assert set(data_files(table)) == used


def start(out, seconds):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ENCODE_SECONDS": str(seconds)}
    command = [sys.executable, "-m", "tests.prepare.extracting", str(out)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)


@pytest.mark.usefixtures("heavy")
def test_killed_at_ten_random_moments_and_gone_on_with(tmp_path):
    write(tmp_path, rows=200)
    generator = random.Random(0)
    finished = functools.partial(tmp_path.glob, ".train.features/[0-9]*.json")
    for _ in range(10):
        process = start(tmp_path, 0.02)
        begun = len(list(finished()))
        while process.poll() is None and len(list(finished())) < begun + 1:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(list(finished())) >= 10
    assert start(tmp_path, 0).wait() == 0
    assert torch.equal(stored(tmp_path), expected(200).half())


def test_another_recipe_than_the_one_begun_is_refused(table, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(extract.Extraction, "commit", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(table)
    with pytest.raises(ValueError, match=r"another recipe .*storage: 'fp16', now 'int8'"):
        run(table, storage="int8")


def test_a_table_that_was_changed_meanwhile_is_left_alone(table, monkeypatch):
    dataset = LatentDataset(table)
    commit = extract.Extraction.commit

    def after_a_change(*arguments):
        LatentDataset(table).table.delete("label = 1")
        return commit(*arguments)

    monkeypatch.setattr(extract.Extraction, "commit", after_a_change)
    with pytest.raises(RuntimeError, match="changed while the features were computed"):
        extract.Extraction(dataset, column(), encode, 4).run()
    assert LatentDataset(table).features == {} and len(LatentDataset(table)) == 23


@pytest.mark.parametrize("name", ["index", "image", "made-up", "", "2d"])
def test_names_that_cannot_be(table, name):
    with pytest.raises(ValueError, match="column is"):
        run(table, name=name)


def test_a_bad_image_is_named_and_nothing_is_changed(tmp_path):
    write(tmp_path, bad=(17,))
    with pytest.raises(ValueError, match="row 17: cannot be decoded"):
        run(tmp_path)
    assert LatentDataset(tmp_path).features == {}


def test_features_that_overflow_are_refused(table):
    dataset = LatentDataset(table)
    with pytest.raises(ValueError, match="made-up: features reach"):
        extract.Extraction(dataset, column(), lambda x: encode(x) * 1e6, 4).run()


def test_a_full_disk_keeps_what_is_done(table, monkeypatch):
    import lance

    merge = lance.fragment.LanceFragment.merge_columns
    calls = []

    def full(fragment, *arguments):
        calls.append(fragment)
        if len(calls) == 3:
            raise OSError("LanceError(IO): No space left on device (os error 28)")
        return merge(fragment, *arguments)

    monkeypatch.setattr(lance.fragment.LanceFragment, "merge_columns", full)
    with pytest.raises(RuntimeError, match="is full; 2 fragments are written and kept"):
        run(table)
    run(table)
    assert torch.equal(stored(table), expected().half())
    assert len(calls) == 2 + 1 + 6


def test_verify_reads_everything_again(table):
    run(table)
    dataset = LatentDataset(table)
    seen = []
    extract.verify(dataset, "made_up", seen.append)
    assert seen[-1] == 45
    checks_file = table / "train.made_up.json"
    checks = json.loads(checks_file.read_text())
    checks[3]["crc32"] ^= 1
    checks_file.write_text(json.dumps(checks))
    with pytest.raises(ValueError, match=r"made_up of rows 18 to 23 \(part 3\) has checksum"):
        extract.verify(dataset, "made_up")
    checks_file.unlink()
    with pytest.raises(ValueError, match="is missing"):
        extract.verify(dataset, "made_up")


def test_the_loader_carries_the_column(table):
    run(table, storage="int8")
    dataset = LatentDataset(table)
    order = SampleOrder(45, 10, 0)
    whole = stored(table)
    with Loader(dataset, order, start=0, stop=8, images=False, features=["made_up"]) as loader:
        for step, batch in enumerate(loader):
            assert "image" not in batch
            assert torch.equal(dataset.features["made_up"].unpack(batch), whole[order.rows(step)])
    assert step == 7


def test_a_column_that_is_not_there_ends_the_loader_with_its_name(table):
    order = SampleOrder(45, 10, 0)
    with (
        Loader(LatentDataset(table), order, start=0, stop=1, features=["made_up"]) as loader,
        pytest.raises(ValueError, match="no column of features 'made_up', expected one of: none"),
    ):
        next(iter(loader))
