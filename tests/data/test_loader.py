"""Batches ahead of time: right, in order, and without a thread or a pipeline left behind."""

import contextlib
import functools
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from repa_fast.data import dataset
from repa_fast.data.dataset import LatentDataset
from repa_fast.data.loader import Loader, read_batch
from repa_fast.data.order import Consecutive, SampleOrder
from tests.data.encoding import (
    COUNT,
    R,
    assert_equal_batches,
    encode,
    noise,
    own_threads,
    write_table,
)
from tests.refusals import refused

pytest.importorskip("lance")

ROOT = Path(__file__).resolve().parents[2]
BATCH = 6
BROKEN_ROW = 17
ENDLESS = {"start": 0, "stop": 10**6}


@pytest.fixture
def order():
    return SampleOrder(COUNT, BATCH, 0)


@pytest.fixture(params=["torch", "dali-cpu"])
def decode(request):
    if request.param == "dali-cpu":
        request.getfixturevalue("with_dali")
    return request.param


@pytest.fixture
def nothing_left(decode, built):
    """(pipelines) -> asserts that so many were built by DALI and that nothing is left."""

    def check(pipelines: int = 1) -> None:
        assert own_threads() == []
        gc.collect()
        assert len(built) == pipelines * (decode == "dali-cpu")
        assert all(reference() is None for reference in built)

    return check


def ends_within(seconds: float, function) -> bool:
    """Whether `function` returns or raises in time, in a thread that can be left behind."""

    def body():
        with contextlib.suppress(BaseException):
            function()

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def test_a_batch_holds_the_rows_asked_for(table):
    indices = np.array([31, 2, 2, 7])
    rows = table.rows(indices)
    expected = {
        "index": torch.tensor([31, 2, 2, 7]),
        "moments": torch.tensor([31.0, 2, 2, 7]).view(4, 1, 1, 1).expand(4, 2, 2, 2),
        "label": torch.tensor([1, 0, 0, 1]),
        "image": torch.from_numpy(np.stack([dataset.decode(data, R) for data in rows["image"]])),
    }
    assert_equal_batches(read_batch(table, indices), expected)
    assert set(read_batch(table, np.arange(3), images=False)) == {"index", "moments", "label"}


@pytest.mark.parametrize("num_workers", [1, 3])
def test_batches_come_in_order(table, decode, num_workers, nothing_left):
    options = {"start": 3, "stop": 15, "num_workers": num_workers, "decode": decode}
    for images in (False, True):  # without images DALI builds no pipeline
        with Loader(table, SampleOrder(COUNT, BATCH, 0), images=images, **options) as loader:
            batches = list(loader)
        assert len(batches) == 12
        fresh = SampleOrder(COUNT, BATCH, 0)
        for step, batch in zip(range(3, 15), batches):
            assert_equal_batches(batch, read_batch(table, fresh.rows(step), images=images))
        nothing_left(pipelines=int(images))


def test_two_ranks_together_read_the_global_batch(table):
    ranks = []
    for rank in range(2):
        share = SampleOrder(COUNT, BATCH, 0)
        with Loader(table, share, start=5, stop=9, rank=rank, world_size=2) as loader:
            ranks.append(list(loader))
    whole = SampleOrder(COUNT, BATCH, 0)
    for step, parts in zip(range(5, 9), zip(*ranks, strict=True)):
        expected = read_batch(table, whole.rows(step))
        assert_equal_batches({k: torch.cat([p[k] for p in parts]) for k in parts[0]}, expected)


def test_given_rows_come_with_a_short_last_batch(table):
    rows = Consecutive(np.array([8, 1, 3, 2, 7]), 2)
    with Loader(table, rows, start=0, stop=rows.steps, num_workers=2) as loader:
        batches = list(loader)
    for batch, given in zip(batches, ([8, 1], [3, 2], [7]), strict=True):
        assert batch["index"].tolist() == given
        assert_equal_batches(batch, read_batch(table, np.array(given)))


def test_no_step_left_is_an_empty_iteration_and_so_is_a_second_one(table, order):
    for start, stop, batches in ((4, 4, 0), (7, 2, 0), (0, 2, 2)):
        with Loader(table, order, start=start, stop=stop) as loader:
            assert len(list(loader)) == batches
            assert ends_within(2, functools.partial(list, loader)), "it waits for ever"
    assert own_threads() == []


def test_an_error_in_a_decode_thread_reaches_the_consumer(tmp_path, order, decode, nothing_left):
    half = encode(noise(BROKEN_ROW))[:200]  # whose header is good: DALI itself refuses it
    broken = write_table(tmp_path / "train.lance", {BROKEN_ROW: half})
    step = next(s for s in range(order.steps_per_epoch * 2) if BROKEN_ROW in order.rows(s))
    loader = Loader(broken, order, start=0, stop=100, num_workers=2, decode=decode)
    read = []
    words = rf"train\.lance row {BROKEN_ROW}: cannot be decoded"
    refused(lambda: read.extend(batch["index"] for batch in loader), words)
    assert len(read) <= step
    nothing_left()


def test_an_error_outside_exception_reaches_the_consumer(table, order, monkeypatch):
    class Panic(BaseException):
        """As pyo3's PanicException, which a panic inside Lance raises."""

    def rows(*_, **__):
        raise Panic

    monkeypatch.setattr(LatentDataset, "rows", rows)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with Loader(table, order, start=0, stop=4) as loader:
        assert ends_within(2, functools.partial(list, loader)), "the consumer waits for ever"


def left_by_an_exception(loader):
    with contextlib.suppress(KeyError), loader:
        for _ in loader:
            assert "repa-fast-prefetch" in own_threads()
            raise KeyError
        pytest.fail("no batch came")


def dropped(loader):
    next(iter(loader))


def closed_twice(loader):
    next(iter(loader))
    loader.close()
    loader.close()


def test_a_loader_that_is_left_leaves_nothing(table, order, decode, nothing_left):
    for pipelines, end in enumerate((left_by_an_exception, dropped, closed_twice), 1):
        end(Loader(table, order, num_workers=3, decode=decode, **ENDLESS))
        nothing_left(pipelines)


HEAVY = pytest.mark.heavy


@pytest.mark.parametrize(
    "decode, processes",
    [("torch", 1), pytest.param("torch", 6, marks=HEAVY), pytest.param("dali-cpu", 6, marks=HEAVY)],
)
def test_a_process_can_end_with_an_open_loader(request, digits_dir, decode, processes):
    if decode == "dali-cpu":
        request.getfixturevalue("with_dali")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "tests.data.ending", f"{digits_dir}/train.lance", decode]
    process = subprocess.run(
        [*program, str(processes)], env=env, capture_output=True, text=True, timeout=400
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == f"ended as they should: {processes}"
    assert process.stderr == ""
