"""Batches ahead of time: right, in order, and without a thread left behind."""

import contextlib
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
from repa_fast.data.digits import digits_metadata, pixel_moments, prepare_digits
from repa_fast.data.loader import Loader, read_batch
from repa_fast.data.order import SampleOrder
from tests.data.encoding import assert_equal_batches, own_threads

pytest.importorskip("lance")

ROOT = Path(__file__).resolve().parents[2]
COUNT, BATCH = 40, 6
BROKEN_ROW = 17
PROCESSES = 20


def write_table(uri: Path, broken: int | None = None) -> LatentDataset:
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3), dtype=np.uint8)
    rows = [
        {"image": dataset.encode(image), "moments": moments, "label": index % 10}
        for index, (image, moments) in enumerate(zip(pixels, pixel_moments(pixels)))
    ]
    if broken is not None:
        rows[broken]["image"] = b"not an image"
    dataset.write(uri, rows, digits_metadata())
    return LatentDataset(uri)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("loader") / "train.lance")


@pytest.fixture(scope="module")
def broken_table(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("broken") / "train.lance", BROKEN_ROW)


@pytest.fixture
def order():
    return SampleOrder(COUNT, BATCH, 0)


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
    batch = read_batch(table, indices)
    rows = table.rows(indices)
    assert batch["index"].tolist() == [31, 2, 2, 7] and batch["index"].dtype == torch.int64
    assert batch["moments"].dtype == torch.float32 and batch["moments"].shape == (4, 6, 16, 16)
    assert np.array_equal(batch["moments"].numpy(), rows["moments"])
    assert batch["label"].dtype == torch.int64 and batch["label"].tolist() == [1, 2, 2, 7]
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (4, 3, 16, 16)
    mean = batch["image"].numpy().astype(np.float32) / 127.5 - 1
    assert np.array_equal(batch["moments"][:, :3].numpy(), mean)


def test_images_are_left_out_where_not_asked_for(table):
    assert set(read_batch(table, np.arange(3), images=False)) == {"index", "moments", "label"}


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("with_images", [True, False])
def test_batches_come_in_order(table, order, num_workers, with_images):
    options = {"start": 3, "stop": 15, "images": with_images, "num_workers": num_workers}
    with Loader(table, order, **options) as loader:
        batches = list(loader)
    assert len(batches) == 12
    for step, batch in zip(range(3, 15), batches):
        fresh = SampleOrder(COUNT, BATCH, 0)
        assert_equal_batches(batch, read_batch(table, fresh.rows(step), images=with_images))


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


def test_no_step_left_is_an_empty_iteration(table, order):
    for start, stop in ((4, 4), (7, 2)):
        with Loader(table, order, start=start, stop=stop) as loader:
            assert list(loader) == []
    assert own_threads() == []


def test_an_error_in_a_decode_thread_reaches_the_consumer(broken_table, order):
    step = next(s for s in range(order.steps_per_epoch * 2) if BROKEN_ROW in order.rows(s))
    loader = Loader(broken_table, order, start=0, stop=100, num_workers=2)
    read = []
    with pytest.raises(ValueError, match=rf"row {BROKEN_ROW}: cannot be decoded"):
        read.extend(batch["index"] for batch in loader)
    assert len(read) <= step
    assert own_threads() == []


def test_an_error_outside_exception_reaches_the_consumer(table, order, monkeypatch):
    class Panic(BaseException):
        """As pyo3's PanicException, which a panic inside Lance raises."""

    def rows(*_, **__):
        raise Panic

    monkeypatch.setattr(LatentDataset, "rows", rows)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with Loader(table, order, start=0, stop=4) as loader:
        assert ends_within(2, lambda: list(loader)), "the consumer waits for ever"


def test_an_exhausted_loader_stays_exhausted(table, order):
    with Loader(table, order, start=0, stop=2) as loader:
        assert len(list(loader)) == 2
        assert ends_within(2, lambda: list(loader)), "the second iteration waits for ever"


def test_leaving_early_joins_all_threads(table, order):
    with Loader(table, order, start=0, stop=10**6, num_workers=3) as loader:
        next(iter(loader))
        assert "repa-fast-prefetch" in own_threads()
    assert own_threads() == []


def test_leaving_by_an_exception_joins_all_threads(table, order):
    def leave():
        with Loader(table, order, start=0, stop=10**6, num_workers=3) as loader:
            for _ in loader:
                raise KeyError

    with pytest.raises(KeyError):
        leave()
    assert own_threads() == []


def test_a_dropped_loader_joins_all_threads(table, order):
    loader = Loader(table, order, start=0, stop=10**6)
    next(iter(loader))
    del loader
    assert own_threads() == []


def test_closing_again_is_harmless(table, order):
    loader = Loader(table, order, start=0, stop=10**6)
    loader.close()
    loader.close()
    assert own_threads() == []


# Nothing forks after lance is imported: the children import it, each for itself.
EXIT_SCRIPT = """
import os, signal, sys
import numpy, torch

uri, processes = sys.argv[1], int(sys.argv[2])

def fork_children():
    '''The number of a child, in it; None in the parent, with all children ended.'''
    statuses, running = [], 0
    for number in range(processes):
        if os.fork() == 0:
            signal.alarm(30)
            return number
        running += 1
        if running == 3:
            statuses.append(os.wait()[1])
            running -= 1
    statuses += [os.wait()[1] for _ in range(running)]
    codes = [os.waitstatus_to_exitcode(status) for status in statuses]
    assert codes == [0] * processes, codes
    print("ended cleanly:", len(codes))
    return None

assert "lance" not in sys.modules
number = fork_children()
if number is not None:
    from repa_fast.data.dataset import LatentDataset
    from repa_fast.data.loader import Loader
    from repa_fast.data.order import SampleOrder

    dataset = LatentDataset(uri)
    order = SampleOrder(len(dataset), 1000, 0)  # large, so that exiting meets a read under way
    loader = Loader(dataset, order, start=0, stop=10**6, images=False)
    batches = iter(loader)
    assert next(batches)["moments"].shape == (1000, 6, 16, 16)
    if number % 3 == 1:
        sys.exit(0)
    if number % 3 == 2:
        try:
            for count, batch in enumerate(batches):
                if count == 3:
                    raise RuntimeError
        except RuntimeError as error:
            kept = error
"""


def test_an_interpreter_can_exit_with_an_open_loader(tmp_path):
    pytest.importorskip("sklearn")
    uri = prepare_digits(tmp_path / "digits")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", EXIT_SCRIPT, str(uri), str(PROCESSES)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == f"ended cleanly: {PROCESSES}"
