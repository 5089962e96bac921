"""Scores of what has a known score, and against naive formulas and independent ones."""

import functools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from repa_fast.eval import scores
from repa_fast.eval.scores import frechet_distance, statistics
from repa_fast.testing import seeded
from tests.refusals import refused

F, WIDE = 6, 12


def naive_distances(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """(N, M) in fp64, by differences."""
    difference = a.double().numpy()[:, None] - b.double().numpy()[None]
    return np.sqrt((difference**2).sum(-1))


def test_the_inception_score_is_a_mean_over_consecutive_splits_of_how_many_classes_they_show():
    surely = 1000 * torch.eye(4)
    logits = torch.cat([surely, surely[[0] * 4], surely[[1, 2]]])  # 4 classes, 1, then 2 of 2
    assert scores.inception_score(logits, split_size=4) == pytest.approx((4 + 1 + 2) / 3)
    assert scores.inception_score(torch.zeros(30, 10)) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("split_size", [7, 20, 100])
def test_the_inception_score_is_the_mean_divergence_from_the_mean(split_size):
    logits = seeded((60, 11), seed=0, std=3)
    posteriors = torch.softmax(logits.double(), 1).numpy()
    expected = [
        math.exp(np.mean([scipy.stats.entropy(p, part.mean(0)) for p in part]))
        for part in np.split(posteriors, range(split_size, 60, split_size))
    ]
    got = scores.inception_score(logits, split_size)
    assert got == pytest.approx(np.mean(expected), rel=1e-12)


@pytest.mark.parametrize("k, radius", [(1, 1.0), (2, 2.0), (3, 4.0)])
def test_the_radius_is_the_distance_to_the_kth_other_image_and_includes_its_end(k, radius):
    # On a line. Seen from 0 the others are at 1, 2 and 4; no other radius reaches below 0.
    real = torch.tensor([[0.0], [1.0], [2.0], [4.0]])
    generated = torch.tensor([[-radius], [-1.001 * radius], [1000.0], [2000.0], [3000.0]])
    precision, _ = scores.precision_recall(real, generated, k=k)
    assert precision == 1 / 5


def test_copies_count_as_neighbours_and_more_than_k_leave_nothing_to_rounding():
    # each has three copies, so every radius is zero; only copies lie within
    real = seeded((5, F), seed=0, std=20).repeat_interleave(4, 0)
    generated = torch.cat([real[:8], real[:8] + 1e-3])
    assert scores.precision_recall(real, generated, chunk=3) == (0.5, 8 / 20)
    # norms of 1e3 and distances of 0: the expanded square alone would be off by 1e-9
    real = seeded((3, 2048), seed=0, mean=20).repeat(7, 1)
    generated = real[torch.randperm(21, generator=torch.Generator().manual_seed(0))]
    for chunk in (2, 5, 21):
        assert scores.precision_recall(real, generated, chunk=chunk) == (1, 1)


@pytest.mark.parametrize("k, chunk", [(1, 7), (2, 64), (3, 30), (3, 4)])
def test_precision_and_recall_are_those_of_all_distances_at_once(k, chunk):
    real, generated = seeded((50, F), seed=0), seeded((64, F), seed=1, mean=0.8, std=1.3)

    def share(queries, centres):
        radii = np.sort(naive_distances(centres, centres), 1)[:, k]  # 0 is the image itself
        return (naive_distances(queries, centres) <= radii).any(1).mean()

    expected = share(generated, real), share(real, generated)
    assert 0.1 < min(expected) < max(expected) < 1
    assert scores.precision_recall(real, generated, k=k, chunk=chunk) == expected


def polynomial_mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    """The unbiased estimate, from sums over pairs that are written out."""

    def mean(a, b, same):
        values = [
            (float(a[i].double() @ b[j].double()) / a.shape[1] + 1) ** 3
            for i in range(len(a))
            for j in range(len(b))
            if not (same and i == j)
        ]
        return sum(values) / len(values)

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def test_kid_of_whole_sets_is_the_unbiased_estimate():
    real, generated = seeded((12, F), seed=0), seeded((12, F), seed=1, mean=0.3)
    mean, deviation = scores.kid(real, generated, subsets=3, size=12)
    assert mean == pytest.approx(polynomial_mmd(real, generated), rel=1e-12)
    assert deviation <= 1e-12  # every subset is the whole


def test_kid_repeats_with_the_seed_and_is_unbiased_for_sets_of_one_distribution():
    real, generated = seeded((2000, F), seed=0), seeded((2000, F), seed=1)
    first, again, other = (
        scores.kid(real, generated, subsets=40, size=100, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    mean, deviation = first
    # deviations fall with the number of subsets, and for the sets themselves with their size
    standard_error = deviation * math.sqrt(1 / 40 + (100 / 2000) ** 2)
    assert 0 < abs(mean) <= 3 * standard_error
    shifted, _ = scores.kid(real, generated + 0.5, subsets=40, size=100)
    assert shifted > 10 * abs(mean)


@pytest.mark.parametrize("chunk", [3, 100])
def test_mmd_is_the_mean_of_kernels_over_all_pairs(chunk):
    real, generated = seeded((13, F), seed=0, std=5), seeded((17, F), seed=1, std=8)
    kernels = [
        np.exp(-(naive_distances(a, b) ** 2) / (2 * 10**2)).mean()
        for a, b in ((real, real), (generated, generated), (real, generated))
    ]
    expected = 1000 * (kernels[0] + kernels[1] - 2 * kernels[2])
    got = scores.mmd_rbf(real, generated, chunk=chunk)
    assert expected > 1 and got == pytest.approx(expected, rel=1e-9)


def test_mmd_of_two_points_has_a_closed_form_and_of_equal_sets_is_none():
    a, b, same = torch.zeros(1, F), torch.full((1, F), 2.0), seeded((20, F), seed=0)
    expected = 2 * (1 - math.exp(-4 * F / 2))
    assert scores.mmd_rbf(a, b, sigma=1.0, scale=1) == pytest.approx(expected, rel=1e-12)
    assert scores.mmd_rbf(same, same) == pytest.approx(0, abs=1000 * 1e-15)


def test_class_accuracy_is_the_share_of_largest_logits_that_are_the_label_s():
    logits = torch.tensor([[0.0, 2.0], [1.0, -1.0], [3.0, 4.0], [5.0, 4.0]])
    assert scores.class_accuracy(logits, torch.tensor([1, 0, 0, 0])) == 0.75
    refused(lambda: scores.class_accuracy(logits, torch.zeros(3)), r"labels .* expected \(4,\)")
    refused(lambda: scores.class_accuracy(logits[:0], torch.zeros(0)), "logits .* N >= 1")


@pytest.mark.parametrize(
    "score, least",
    [(scores.precision_recall, 4), (functools.partial(scores.kid, size=5), 5), (scores.mmd_rbf, 1)],
)
def test_features_that_do_not_do_are_refused(score, least):
    enough, few, wide = torch.randn(least, F), torch.randn(least - 1, F), torch.randn(least, F + 1)
    score(enough, enough)
    refused(lambda: score(few, enough), f"real features .* N >= {least}")
    refused(lambda: score(enough, few), f"generated features .* N >= {least}")
    refused(lambda: score(enough, wide), "width 6, generated 7")
    for bad in (torch.nan, torch.inf):
        call = functools.partial(score, enough, torch.full((least, F), bad))
        refused(call, "generated features are not all finite")
    logits = torch.tensor([[0.0, -torch.inf]])
    refused(lambda: scores.inception_score(logits), "logits are not all finite")


def gaussian(seed: int, rank: int = 3 * WIDE) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    factor = generator.standard_normal((WIDE, rank))
    return generator.standard_normal(WIDE), factor @ factor.T / rank


def rotated(variances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean 0 and a covariance with these eigenvalues, those not given being 0, in one basis."""
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((WIDE, WIDE)))[0]
    return np.zeros(WIDE), (basis * np.pad(variances, (0, WIDE - len(variances)))) @ basis.T


def line(mean: float, std: float) -> tuple[np.ndarray, np.ndarray]:
    return np.array([mean]), np.array([[std**2]])


MEAN, COV = gaussian(0)
SHIFT = np.random.default_rng(1).standard_normal(WIDE)
FLAT = statistics(np.random.default_rng(0).standard_normal((5, WIDE)))
A, B = np.random.default_rng(0).uniform(0, 3, (2, WIDE))
LOW, HIGH = np.array([1, 2, 3, 4, 0, 0, 0]), np.array([0, 0, 5, 6, 7, 8, 9])
ZERO, ONE, POINT = np.zeros(WIDE), np.ones(WIDE), np.zeros((WIDE, WIDE))


def apart(a: np.ndarray, b: np.ndarray):
    """The distance of covariances with these eigenvalues in one basis."""
    return pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-6)


CASES = {
    "itself": (gaussian(0), gaussian(0), pytest.approx(0, abs=1e-12 * np.trace(COV))),
    "itself, fewer rows than features": (FLAT, FLAT, pytest.approx(0, abs=1e-6)),
    "shifted": ((MEAN, COV), (MEAN + SHIFT, COV), pytest.approx(SHIFT @ SHIFT)),
    "grown": ((MEAN, COV), (MEAN, 100 * COV), pytest.approx(9**2 * np.trace(COV))),
    "one dimension": (line(1, 0.1), line(-1, 5), pytest.approx(2**2 + 4.9**2)),
    "one dimension, of a point": (line(0, 0), line(2, 3), pytest.approx(2**2 + 3**2)),
    "commuting": (rotated(A), rotated(B), apart(A, B)),
    "singular": (rotated(LOW), rotated(HIGH), apart(LOW, HIGH)),
    "points": ((ZERO, POINT), (ONE, POINT), WIDE),
}


@pytest.mark.parametrize("a, b, expected", CASES.values(), ids=CASES)
def test_the_distance_has_closed_forms(a, b, expected):
    assert frechet_distance(*a, *b) == expected


def test_the_distance_agrees_with_scipys_square_root_and_is_symmetric():
    (mean_a, cov_a), (mean_b, cov_b) = gaussian(0), gaussian(100)
    root = np.trace(scipy.linalg.sqrtm(cov_a @ cov_b)).real
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected, rel=1e-9)
    a, b = gaussian(2, rank=5), gaussian(3)
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-7)


def test_statistics_are_mean_and_unbiased_covariance_in_fp64():
    """And are refused of too few rows."""
    features = np.random.default_rng(0).standard_normal((50, WIDE)).astype(np.float32)
    mean, cov = statistics(features)
    assert mean.dtype == cov.dtype == np.float64 and cov.shape == (WIDE, WIDE)
    wide = features.astype(np.float64)
    centred = wide - wide.sum(0) / 50
    assert np.allclose(mean, wide.sum(0) / 50, rtol=1e-13)
    assert np.allclose(cov, centred.T @ centred / 49, rtol=1e-12)
    mean, cov = statistics(np.array([[1.0], [3.0]]))
    assert mean.tolist() == [2.0] and cov.tolist() == [[2.0]]
    for few in (features[:1], features[:0], features[0]):
        refused(functools.partial(statistics, few), r"expected \(N, F\) with N >= 2")
