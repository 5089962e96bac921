"""Scores of posteriors and manifolds whose scores are known, and against naive formulas."""

import math

import numpy as np
import pytest
import torch

from repa_fast.eval import scores
from repa_fast.testing import seeded

F = 6


def naive_distances(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """(N, M) in fp64, by differences."""
    difference = a.double().numpy()[:, None] - b.double().numpy()[None]
    return np.sqrt((difference**2).sum(-1))


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_sure_and_diverse_posteriors_score_the_number_of_classes(classes):
    logits = 1000 * torch.eye(classes).repeat(20, 1)
    assert scores.inception_score(logits) == pytest.approx(classes, rel=1e-12)


@pytest.mark.parametrize("logits", [torch.zeros(30, 10), seeded((1, 10), seed=0).repeat(30, 1)])
def test_equal_posteriors_score_one(logits):
    assert scores.inception_score(logits) == pytest.approx(1, rel=1e-12)


def test_logits_of_minus_infinity_are_not_finite():
    with pytest.raises(ValueError, match="logits are not all finite"):
        scores.inception_score(torch.tensor([[0.0, -torch.inf]]))


def test_the_inception_score_is_a_mean_over_consecutive_splits():
    surely = 1000 * torch.eye(4)
    logits = torch.cat([surely, surely[[0] * 4], surely[[1, 2]]])  # 4 classes, 1, then 2 of 2
    assert scores.inception_score(logits, split_size=4) == pytest.approx((4 + 1 + 2) / 3)


@pytest.mark.parametrize("split_size", [7, 20, 60, 100])
def test_the_inception_score_is_the_mean_divergence_from_the_mean(split_size):
    stats = pytest.importorskip("scipy.stats")
    logits = seeded((60, 11), seed=0, std=3)
    posteriors = torch.softmax(logits.double(), 1).numpy()
    expected = [
        math.exp(np.mean([stats.entropy(p, part.mean(0)) for p in part]))
        for part in np.split(posteriors, range(split_size, 60, split_size))
    ]
    got = scores.inception_score(logits, split_size)
    assert got == pytest.approx(np.mean(expected), rel=1e-12)


def test_equal_sets_have_full_precision_and_recall():
    features = seeded((40, F), seed=0)
    assert scores.precision_recall(features, features.clone()) == (1, 1)


def test_disjoint_clusters_have_none():
    features = seeded((40, F), seed=0)
    assert scores.precision_recall(features, features + 100) == (0, 0)


def test_one_of_two_modes_is_precise_and_recalls_half():
    left, right = seeded((40, F), seed=0), seeded((40, F), seed=1) + 100
    assert scores.precision_recall(torch.cat([left, right]), left) == (1, 0.5)
    assert scores.precision_recall(left, torch.cat([left, right])) == (0.5, 1)


@pytest.mark.parametrize("k, radius", [(1, 1.0), (2, 2.0), (3, 4.0)])
def test_the_radius_is_the_distance_to_the_kth_other_image_and_includes_its_end(k, radius):
    # On a line. Seen from 0 the others are at 1, 2 and 4; no other radius reaches below 0.
    real = torch.tensor([[0.0], [1.0], [2.0], [4.0]])
    generated = torch.tensor([[-radius], [-1.001 * radius], [1000.0], [2000.0], [3000.0]])
    precision, _ = scores.precision_recall(real, generated, k=k)
    assert precision == 1 / 5


def test_copies_count_as_neighbours():
    # each has three copies, so every radius is zero; only copies lie within
    real = seeded((5, F), seed=0, std=20).repeat_interleave(4, 0)
    generated = torch.cat([real[:8], real[:8] + 1e-3])
    precision, recall = scores.precision_recall(real, generated, chunk=3)
    assert (precision, recall) == (0.5, 8 / 20)


def test_more_copies_than_k_leave_nothing_to_rounding():
    # norms of 1e3 and distances of 0: the expanded square alone would be off by 1e-9
    real = seeded((3, 2048), seed=0, mean=20).repeat(7, 1)
    generated = real[torch.randperm(21, generator=torch.Generator().manual_seed(0))]
    for chunk in (2, 5, 21):
        assert scores.precision_recall(real, generated, chunk=chunk) == (1, 1)


@pytest.mark.parametrize("chunk", [1, 7, 30, 64])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_precision_and_recall_are_those_of_all_distances_at_once(k, chunk):
    real, generated = seeded((50, F), seed=0), seeded((64, F), seed=1, mean=0.8, std=1.3)

    def share(queries, centres):
        radii = np.sort(naive_distances(centres, centres), 1)[:, k]  # 0 is the image itself
        return (naive_distances(queries, centres) <= radii).any(1).mean()

    expected = share(generated, real), share(real, generated)
    assert 0.1 < min(expected) < max(expected) < 1
    assert scores.precision_recall(real, generated, k=k, chunk=chunk) == expected


def test_scikit_learn_finds_the_same_radii():
    neighbors = pytest.importorskip("sklearn.neighbors")
    features = seeded((50, F), seed=0)
    found = neighbors.NearestNeighbors(n_neighbors=4).fit(features.double().numpy())
    expected = found.kneighbors(features.double().numpy())[0][:, 3]
    got = scores._squared_radii(features, 3, 16).sqrt().numpy()
    assert np.allclose(got, expected, rtol=1e-10)


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


def test_kid_is_unbiased_for_sets_of_one_distribution():
    real, generated = seeded((2000, F), seed=0), seeded((2000, F), seed=1)
    mean, deviation = scores.kid(real, generated, subsets=40, size=100)
    # deviations fall with the number of subsets, and for the sets themselves with their size
    standard_error = deviation * math.sqrt(1 / 40 + (100 / 2000) ** 2)
    assert 0 < abs(mean) <= 3 * standard_error
    shifted, _ = scores.kid(real, generated + 0.5, subsets=40, size=100)
    assert shifted > 10 * abs(mean)


def test_kid_repeats_with_the_seed():
    real, generated = seeded((50, F), seed=0), seeded((60, F), seed=1)
    first = scores.kid(real, generated, subsets=4, size=20, seed=1)
    assert scores.kid(real, generated, subsets=4, size=20, seed=1) == first
    assert scores.kid(real, generated, subsets=4, size=20, seed=2) != first
    assert first[1] > 0


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


@pytest.mark.parametrize("sigma", [1.0, 10.0])
def test_mmd_of_two_points_has_a_closed_form(sigma):
    a, b = torch.zeros(1, F), torch.full((1, F), 2.0)
    expected = 1000 * 2 * (1 - math.exp(-4 * F / (2 * sigma**2)))
    assert scores.mmd_rbf(a, b, sigma=sigma) == pytest.approx(expected, rel=1e-12)
    assert scores.mmd_rbf(a, b, sigma=sigma, scale=1) == pytest.approx(expected / 1000, rel=1e-12)


def test_mmd_of_equal_sets_is_zero():
    features = seeded((20, F), seed=0)
    assert scores.mmd_rbf(features, features) == pytest.approx(0, abs=1000 * 1e-15)


@pytest.mark.parametrize(
    "score, least",
    [
        (scores.precision_recall, 4),
        (lambda a, b: scores.kid(a, b, size=5), 5),
        (scores.mmd_rbf, 1),
    ],
)
def test_features_that_do_not_do_are_refused(score, least):
    enough, few = torch.randn(least, F), torch.randn(least - 1, F)
    score(enough, enough)
    for pair, name in (((few, enough), "real"), ((enough, few), "generated")):
        with pytest.raises(ValueError, match=f"{name} features .* N >= {least}"):
            score(*pair)
    with pytest.raises(ValueError, match="width 6, generated 7"):
        score(enough, torch.randn(least, F + 1))
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="generated features are not all finite"):
            score(enough, torch.full((least, F), bad))
