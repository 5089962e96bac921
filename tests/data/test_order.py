"""Sample order is a pure function of (seed, step), whatever the world size; or the rows given."""

import numpy as np
import pytest

from repa_fast.data.dataset import LatentDataset
from repa_fast.data.loader import Loader
from repa_fast.data.order import Consecutive, SampleOrder
from tests.analysis.analysing import noise_images, write_table

NUM_ROWS, BATCH = 103, 12  # 8 steps per epoch, 7 rows dropped


def order(seed: int = 0) -> SampleOrder:
    return SampleOrder(NUM_ROWS, BATCH, seed)


def epoch_rows(seed: int, epoch: int) -> np.ndarray:
    fresh = order(seed)
    steps = range(epoch * fresh.steps_per_epoch, (epoch + 1) * fresh.steps_per_epoch)
    return np.concatenate([fresh.rows(step) for step in steps])


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_is_a_permutation_without_the_partial_batch(epoch):
    rows = epoch_rows(0, epoch)
    assert len(rows) == NUM_ROWS // BATCH * BATCH == order().steps_per_epoch * BATCH
    assert len(set(rows.tolist())) == len(rows)
    assert rows.min() >= 0 and rows.max() < NUM_ROWS
    assert not np.array_equal(rows, np.sort(rows))


def test_every_row_is_seen_over_epochs():
    seen = np.concatenate([epoch_rows(0, epoch) for epoch in range(5)])
    assert set(seen.tolist()) == set(range(NUM_ROWS))


def test_no_row_is_dropped_where_batches_divide_the_rows():
    rows = SampleOrder(24, 8, 0)
    assert rows.steps_per_epoch == 3
    assert sorted(np.concatenate([rows.rows(step) for step in range(3)])) == list(range(24))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("step", [0, 7, 8, 30])
def test_ranks_take_disjoint_parts_of_the_same_global_batch(world_size, step):
    parts = [order().rows(step, rank, world_size) for rank in range(world_size)]
    assert [len(part) for part in parts] == [BATCH // world_size] * world_size
    assert {part.dtype for part in parts} == {np.dtype(np.int64)}
    assert np.array_equal(np.concatenate(parts), order().rows(step))


def test_epochs_differ():
    assert not np.array_equal(epoch_rows(0, 0), epoch_rows(0, 1))


def test_seeds_differ():
    assert not np.array_equal(epoch_rows(0, 0), epoch_rows(1, 0))
    assert not np.array_equal(epoch_rows(0, 1), epoch_rows(1, 0))


@pytest.mark.parametrize("start", [1, 7, 8, 9, 20])
def test_a_fresh_order_goes_on_where_another_stopped(start):
    uninterrupted, resumed = order(3), order(3)
    whole = [uninterrupted.rows(step) for step in range(26)]
    rest = [resumed.rows(step) for step in range(start, 26)]
    assert np.array_equal(whole[start:], rest)


def test_steps_may_be_asked_for_in_any_order():
    once = order()
    forward = [once.rows(step).copy() for step in range(20)]
    backward = [once.rows(step).copy() for step in reversed(range(20))]
    assert np.array_equal(forward, backward[::-1])


def test_a_batch_of_all_rows_is_one_step_per_epoch():
    whole = SampleOrder(5, 5, 0)
    assert whole.steps_per_epoch == 1
    assert sorted(whole.rows(0)) == sorted(whole.rows(9)) == [0, 1, 2, 3, 4]


def test_fewer_rows_than_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"11 rows.*12"):
        SampleOrder(11, 12, 0)


@pytest.mark.parametrize("batch, lengths", [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_given_rows_come_in_their_order_and_none_is_dropped(batch, lengths):
    given = np.array([8, 1, 30, 2, 7])
    rows = Consecutive(given, batch)
    parts = [rows.rows(step) for step in range(rows.steps)]
    assert [len(part) for part in parts] == lengths
    assert np.array_equal(np.concatenate(parts), given)
    assert {part.dtype for part in parts} == {np.dtype(np.int64)}


def test_no_rows_are_no_steps():
    assert Consecutive(np.empty(0, np.int64), 3).steps == 0


def test_a_loader_brings_given_rows_with_a_short_last_batch(tmp_path):
    images = noise_images(9)
    write_table(tmp_path / "train.lance", images, np.arange(9) % 4)
    rows = Consecutive(np.array([8, 1, 3, 2, 7]), 2)
    dataset = LatentDataset(tmp_path)
    with Loader(dataset, rows, start=0, stop=rows.steps, num_workers=2) as loader:
        batches = list(loader)
    assert [batch["index"].tolist() for batch in batches] == [[8, 1], [3, 2], [7]]
    assert [batch["label"].tolist() for batch in batches] == [[0, 1], [3, 2], [3]]
    pixels = np.concatenate([batch["image"].numpy() for batch in batches]).transpose(0, 2, 3, 1)
    assert np.array_equal(pixels, images[[8, 1, 3, 2, 7]])
