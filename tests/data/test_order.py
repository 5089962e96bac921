"""Sample order is a pure function of (seed, step), whatever the world size; or the rows given."""

import numpy as np
import pytest

from repa_fast.data.order import Consecutive, SampleOrder
from tests.refusals import refused

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


@pytest.mark.parametrize("num_rows, batch, steps", [(24, 8, 3), (5, 5, 1)])
def test_no_row_is_dropped_where_batches_divide_the_rows(num_rows, batch, steps):
    rows = SampleOrder(num_rows, batch, 0)
    assert rows.steps_per_epoch == steps
    for epoch in (0, 9):
        numbers = range(epoch * steps, (epoch + 1) * steps)
        assert sorted(np.concatenate([rows.rows(step) for step in numbers])) == [*range(num_rows)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("step", [0, 7, 8, 30])
def test_ranks_take_disjoint_parts_of_the_same_global_batch(world_size, step):
    parts = [order().rows(step, rank, world_size) for rank in range(world_size)]
    assert [len(part) for part in parts] == [BATCH // world_size] * world_size
    assert {part.dtype for part in parts} == {np.dtype(np.int64)}
    assert np.array_equal(np.concatenate(parts), order().rows(step))


@pytest.mark.parametrize(
    "one, other", [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 1), (1, 1)), ((0, 1), (1, 0))]
)
def test_seeds_and_epochs_differ(one, other):
    assert not np.array_equal(epoch_rows(*one), epoch_rows(*other))


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


def test_fewer_rows_than_a_batch_are_refused():
    refused(lambda: SampleOrder(11, 12, 0), r"11 rows.*12")


@pytest.mark.parametrize("batch, lengths", [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_given_rows_come_in_their_order_and_none_is_dropped(batch, lengths):
    given = np.array([8, 1, 30, 2, 7])
    rows = Consecutive(given, batch)
    parts = [rows.rows(step) for step in range(rows.steps)]
    assert [len(part) for part in parts] == lengths
    assert np.array_equal(np.concatenate(parts), given)
    assert {part.dtype for part in parts} == {np.dtype(np.int64)}
    assert Consecutive(given[:0], batch).steps == 0
