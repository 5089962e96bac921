"""Sample order is a pure function of (seed, step), whatever the world size; or the rows given."""

import numpy as np
import pytest

from repa_fast.data.order import Consecutive, SampleOrder
from tests.refusals import refused

NUM_ROWS, BATCH = 103, 12  # 8 steps per epoch, 7 rows dropped


def order(seed: int = 0) -> SampleOrder:
    return SampleOrder(NUM_ROWS, BATCH, seed)


def epoch_rows(fresh: SampleOrder, epoch: int) -> np.ndarray:
    steps = range(epoch * fresh.steps_per_epoch, (epoch + 1) * fresh.steps_per_epoch)
    return np.concatenate([fresh.rows(step) for step in steps])


@pytest.mark.parametrize("num_rows, batch, steps", [(NUM_ROWS, BATCH, 8), (24, 8, 3), (5, 5, 1)])
def test_an_epoch_is_a_permutation_without_the_partial_batch(num_rows, batch, steps):
    fresh, seen = SampleOrder(num_rows, batch, 0), set()
    assert fresh.steps_per_epoch == steps
    for epoch in (0, 1, 5, 2, 3):
        rows = epoch_rows(fresh, epoch).tolist()
        assert len(rows) == len(set(rows)) == steps * batch and rows != sorted(rows)
        seen.update(rows)
    assert seen == set(range(num_rows))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("step", [0, 7, 8, 30])
def test_ranks_take_disjoint_parts_of_the_same_global_batch(world_size, step):
    parts = [order().rows(step, rank, world_size) for rank in range(world_size)]
    assert [len(part) for part in parts] == [BATCH // world_size] * world_size
    assert {part.dtype for part in parts} == {np.dtype(np.int64)}
    assert np.array_equal(np.concatenate(parts), order().rows(step))


def test_seeds_and_epochs_differ():
    epochs = [epoch_rows(order(seed), epoch).tobytes() for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(epochs)) == 4


def test_steps_may_be_asked_for_in_any_order_and_from_anywhere():
    whole = [order(3).rows(step) for step in range(26)]
    for steps in (range(26), range(25, -1, -1), *(range(first, 26) for first in (1, 7, 8, 9, 20))):
        fresh = order(3)
        assert np.array_equal([fresh.rows(step) for step in steps], [whole[s] for s in steps])


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
