"""Streamed moments and rows against those of the whole set, in one process and in several."""

import functools

import numpy as np
import pytest
import torch

from repa_fast.distributed import World
from repa_fast.eval.scores import frechet_distance
from repa_fast.eval.statistics import Moments, Rows
from repa_fast.testing import seeded
from tests.eval import merging
from tests.refusals import refused

ALONE = World(0, 1, torch.device("cpu"))
F = 7


def streamed(rows: torch.Tensor, sizes: list[int]) -> Moments:
    moments = Moments(rows.shape[1])
    for part in rows.split(sizes):
        moments.update(part)
    return moments


def assert_moments(moments: Moments, rows: torch.Tensor, rtol: float = 1e-10) -> None:
    """Equal to numpy's mean and covariance of the whole."""
    wide = rows.double().numpy()
    mean, cov = moments.statistics()
    assert mean.dtype == cov.dtype == np.float64 and cov.shape == (rows.shape[1],) * 2
    assert moments.count == len(rows)
    assert np.allclose(mean, wide.mean(0), rtol=rtol, atol=0)
    expected = np.cov(wide, rowvar=False)
    assert np.abs(cov - expected).max() <= rtol * np.abs(expected).max()


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [1, 2, 57], [0, 30, 30], [7] * 8 + [4]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_however_rows_are_cut_the_moments_are_those_of_the_whole(sizes, dtype):
    rows = seeded((60, F), seed=0, dtype=dtype)
    moments = streamed(rows, sizes)
    assert_moments(moments, rows)
    moments.reduce(ALONE)
    assert_moments(moments, rows)


def test_a_mean_that_is_large_beside_the_deviations_costs_no_digits():
    # sums of squares would lose 1e16 * eps, all digits of a variance of 1
    rows = seeded((400, F), seed=0, dtype=torch.float64, mean=1e8)
    assert_moments(streamed(rows, [10] * 40), rows, rtol=1e-6)


def test_the_order_of_rows_does_not_matter():
    rows = seeded((60, F), seed=0)
    first = streamed(rows, [20] * 3).statistics()
    second = streamed(rows[torch.randperm(60, generator=torch.manual_seed(0))], [9] * 6 + [6])
    for a, b in zip(first, second.statistics()):
        assert np.abs(a - b).max() <= 1e-13 * np.abs(a).max()


@pytest.mark.parametrize("at", [0, 1, 23, 60])
def test_two_parts_merge_to_the_whole_and_a_restored_one_shares_no_memory(at):
    rows = seeded((60, F), seed=0)
    first, second = streamed(rows[:at], [at]), streamed(rows[at:], [60 - at])
    restored = Moments.from_state_dict(second.state_dict())
    first.merge(restored)
    assert_moments(first, rows)
    restored.update(seeded((5, F), seed=1))
    assert second.count == 60 - at
    if second.count > 1:
        assert_moments(second, rows[at:])


@pytest.mark.parametrize("shares", merging.SHARES)
def test_several_processes_have_the_moments_and_rows_of_one(ranks, shares):
    rows = merging.features()
    for found in ranks(merging.collect, shares, size=len(shares)):
        assert_moments(Moments.from_state_dict(found["moments"]), rows)
        assert torch.equal(found["rows"], rows.float())


def infinite() -> torch.Tensor:
    rows = seeded((10, F), seed=0)
    rows[3, 2] = torch.inf
    return rows


@pytest.mark.parametrize(
    "rows, at_least, words",
    [
        (torch.zeros(0, F), 2, "there are 0 images, expected at least 2"),
        (torch.zeros(1, F), 0, "there are 1 images, expected at least 2"),
        (torch.zeros(9, F), 10, "there are 9 images, expected at least 10"),
        (torch.full((10, F), torch.nan), 0, "not all finite"),
        (infinite(), 0, "not all finite"),
    ],
)
def test_too_few_images_and_features_that_are_not_finite_are_refused(rows, at_least, words):
    moments = streamed(rows, [len(rows)])
    refused(lambda: moments.statistics(at_least), words)
    streamed(seeded((10, F), seed=0), [10]).statistics(10)


@pytest.mark.parametrize("rows", [torch.zeros(3, F + 1), torch.zeros(F), torch.zeros(3, F).int()])
def test_other_rows_are_refused(rows):
    words = rf"expected floating point \(B, {F}\)"
    refused(lambda: Moments(F).update(rows), words)
    refused(lambda: Rows(F).add(torch.arange(3), rows), words)


def test_rows_come_in_the_order_of_their_images():
    features, rows = seeded((9, F), seed=0), Rows(F)
    for index in torch.tensor([[8, 1, 4], [0, 7, 2], [5, 3, 6]]):
        rows.add(index, features[index])
    assert torch.equal(rows.gather(9, ALONE), features)
    assert torch.equal(rows.gather(4, ALONE), features[:4])


@pytest.mark.parametrize(
    "index, message",
    [
        ([0, 1, 3], r"1 are missing \[2\], 0 are repeated \[\]"),
        ([0, 1, 2, 3, 1], r"0 are missing \[\], 1 are repeated \[1\]"),
        ([], r"4 are missing \[0, 1, 2, 3\]"),
    ],
)
def test_images_that_are_missing_or_repeated_are_named(index, message):
    rows = Rows(F)
    rows.add(torch.tensor(index, dtype=torch.int64), torch.zeros(len(index), F))
    refused(lambda: rows.gather(4, ALONE), f"expected images 0 to 3 once each; {message}")
    few, words = torch.arange(2), r"index has shape \(2,\), expected \(3,\)"
    refused(lambda: rows.add(few, torch.zeros(3, F)), words)


def test_the_distance_refuses_statistics_of_other_features():
    a, b = (streamed(seeded((9, width), seed=0), [9]).statistics() for width in (F, F + 1))
    for given in ((*a, *b), (a[0], b[1], *a), (a[0], a[1][0], *a)):
        call = functools.partial(frechet_distance, *given)
        refused(call, r"expected \(F\), \(F, F\), \(F\), \(F, F\)")
