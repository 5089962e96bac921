"""Streamed moments and rows against those of the whole set, in one process and in several."""

import functools

import numpy as np
import pytest
import torch

from repa_fast.distributed import World
from repa_fast.eval.scores import frechet_distance
from repa_fast.eval.statistics import Moments, Rows
from repa_fast.testing import seeded
from tests.refusals import refused

ALONE = World(0, 1, torch.device("cpu"))
F = 7
UNEVEN = [10, 0, 2, 4, 6, 8, 1, 3], [9, 7, 11, 5, 12]
"""Numbers of images by rank; 11 and 12 are beyond the last."""


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


def features() -> torch.Tensor:
    """Of 11 images, with means that are large beside the deviations."""
    return seeded((11, F), seed=0, dtype=torch.float64, mean=1e3)


def collect(world: World, shares: tuple[list[int], ...]) -> tuple[Moments, torch.Tensor]:
    """Merged moments, and the gathered rows, as one of the processes of `ranks`."""
    index, moments, rows = torch.tensor(shares[world.rank]).long(), Moments(F), Rows(F)
    for part in features()[index[index < 11]].split(3):
        moments.update(part)
    rows.add(index, torch.cat([features(), torch.full((2, F), torch.nan)])[index])
    moments.reduce(world)
    return moments, rows.gather(11, world)


@pytest.mark.parametrize(
    "shares",
    [UNEVEN, ([*range(11)], []), pytest.param((*UNEVEN, []), marks=pytest.mark.heavy)],
)
def test_several_processes_have_the_moments_and_rows_of_one(ranks, shares):
    for moments, rows in ranks(collect, shares, size=len(shares)):
        assert_moments(moments, features())
        assert torch.equal(rows, features().float())


INFINITE = torch.zeros(10, F)
INFINITE[3, 2] = torch.inf


@pytest.mark.parametrize("rows, at_least, words", [
    (torch.zeros(0, F), 2, "there are 0 images, expected at least 2"),
    (torch.zeros(1, F), 0, "there are 1 images, expected at least 2"),
    (torch.zeros(9, F), 10, "there are 9 images, expected at least 10"),
    (torch.full((10, F), torch.nan), 0, "not all finite"),
    (INFINITE, 0, "not all finite"),
])  # fmt: skip
def test_too_few_images_and_features_that_are_not_finite_are_refused(rows, at_least, words):
    moments = streamed(rows, [len(rows)])
    refused(lambda: moments.statistics(at_least), words)
    streamed(torch.zeros(10, F), [10]).statistics(10)


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


@pytest.mark.parametrize("index, message", [
    ([0, 1, 3], r"1 are missing \[2\], 0 are repeated \[\]"),
    ([0, 1, 2, 3, 1], r"0 are missing \[\], 1 are repeated \[1\]"),
    ([], r"4 are missing \[0, 1, 2, 3\]"),
])  # fmt: skip
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
