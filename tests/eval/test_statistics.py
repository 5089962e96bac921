"""Streamed moments and rows against those of the whole set, in one process and in several."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from repa_fast.distributed import World
from repa_fast.eval.scores import frechet_distance
from repa_fast.eval.statistics import Moments, Rows
from repa_fast.testing import seeded
from tests.eval import merging

ROOT = Path(__file__).parents[2]
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
    assert_moments(streamed(rows, sizes), rows)


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
def test_two_parts_merge_to_the_whole(at):
    rows = seeded((60, F), seed=0)
    first, second = streamed(rows[:at], [at]), streamed(rows[at:], [60 - at])
    first.merge(Moments.from_state_dict(second.state_dict()))
    assert_moments(first, rows)


def test_a_restored_state_does_not_share_memory():
    moments = streamed(seeded((5, F), seed=0), [5])
    restored = Moments.from_state_dict(moments.state_dict())
    restored.update(seeded((5, F), seed=1))
    assert_moments(moments, seeded((5, F), seed=0))


@pytest.mark.usefixtures("torchrun")
def test_three_processes_have_the_moments_and_rows_of_one(tmp_path):
    env = {**os.environ, "OUT": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.run(
        [*command, f"--nproc-per-node={merging.SIZE}", "-m", "tests.eval.merging"],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    rows = merging.features()
    for rank in range(merging.SIZE):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert_moments(Moments.from_state_dict(found["moments"]), rows)
        assert torch.equal(found["rows"], rows.float())


def test_one_process_reduces_to_itself():
    rows = seeded((20, F), seed=0)
    moments = streamed(rows, [20])
    moments.reduce(ALONE)
    assert_moments(moments, rows)


@pytest.mark.parametrize("count, at_least, expected", [(0, 2, 2), (1, 0, 2), (9, 10, 10)])
def test_fewer_images_than_asked_for_are_refused(count, at_least, expected):
    moments = streamed(seeded((count, F), seed=0), [count])
    with pytest.raises(ValueError, match=f"there are {count} images, expected at least {expected}"):
        moments.statistics(at_least)


def test_as_many_as_asked_for_are_enough():
    streamed(seeded((10, F), seed=0), [10]).statistics(10)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(bad):
    rows = seeded((10, F), seed=0)
    rows[3, 2] = bad
    with pytest.raises(ValueError, match="not all finite"):
        streamed(rows, [5, 5]).statistics()


@pytest.mark.parametrize("rows", [torch.zeros(3, F + 1), torch.zeros(F), torch.zeros(3, F).int()])
def test_other_rows_are_refused(rows):
    for take in (Moments(F).update, lambda r: Rows(F).add(torch.arange(3), r)):
        with pytest.raises(ValueError, match=rf"expected floating point \(B, {F}\)"):
            take(rows)


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
    with pytest.raises(ValueError, match=f"expected images 0 to 3 once each; {message}"):
        rows.gather(4, ALONE)


def test_rows_want_one_index_each():
    with pytest.raises(ValueError, match=r"index has shape \(2,\), expected \(3,\)"):
        Rows(F).add(torch.arange(2), torch.zeros(3, F))


def test_streamed_moments_go_into_the_frechet_distance():
    rows = seeded((40, F), seed=0, dtype=torch.float64)
    shift = torch.arange(F) / 10
    a, b = streamed(rows, [40]).statistics(), streamed(rows + shift, [11, 29]).statistics()
    assert frechet_distance(*a, *b) == pytest.approx((shift @ shift).item(), rel=1e-6)


def test_the_distance_refuses_statistics_of_other_features():
    a, b = (streamed(seeded((9, width), seed=0), [9]).statistics() for width in (F, F + 1))
    for given in ((*a, *b), (a[0], b[1], *a), (a[0], a[1][0], *a)):
        with pytest.raises(ValueError, match=r"expected \(F\), \(F, F\), \(F\), \(F, F\)"):
            frechet_distance(*given)
