"""The Frechet distance against closed forms and an independent matrix square root."""

import numpy as np
import pytest

from repa_fast.eval.scores import frechet_distance, statistics

F = 12


def gaussian(seed: int, rank: int = 3 * F) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    factor = generator.standard_normal((F, rank))
    return generator.standard_normal(F), factor @ factor.T / rank


def orthogonal(seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((F, F)))[0]


def test_a_gaussian_is_at_no_distance_from_itself():
    mean, cov = gaussian(0)
    assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-12 * np.trace(cov))


def test_a_shift_costs_its_squared_length():
    mean, cov = gaussian(0)
    shift = np.random.default_rng(1).standard_normal(F)
    assert frechet_distance(mean, cov, mean + shift, cov) == pytest.approx(shift @ shift)


@pytest.mark.parametrize("factor", [0.25, 4.0, 100.0])
def test_a_scaled_gaussian_is_at_its_closed_form(factor):
    mean, cov = gaussian(0)
    expected = (factor**0.5 - 1) ** 2 * np.trace(cov)
    assert frechet_distance(mean, cov, mean, factor * cov) == pytest.approx(expected)


@pytest.mark.parametrize("a, b", [((0, 1), (3, 2)), ((1, 0.1), (-1, 5)), ((0, 0), (2, 3))])
def test_one_dimension_has_a_closed_form(a, b):
    (mean_a, std_a), (mean_b, std_b) = a, b
    got = frechet_distance(
        np.array([mean_a]), np.array([[std_a**2]]), np.array([mean_b]), np.array([[std_b**2]])
    )
    assert got == pytest.approx((mean_a - mean_b) ** 2 + (std_a - std_b) ** 2)


def test_commuting_covariances_have_a_closed_form():
    generator, basis = np.random.default_rng(0), orthogonal(1)
    a, b = generator.uniform(0, 3, F), generator.uniform(0, 3, F)
    got = frechet_distance(np.zeros(F), (basis * a) @ basis.T, np.zeros(F), (basis * b) @ basis.T)
    assert got == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum())


@pytest.mark.parametrize("seed", range(5))
def test_the_distance_agrees_with_scipys_square_root(seed):
    linalg = pytest.importorskip("scipy.linalg")
    (mean_a, cov_a), (mean_b, cov_b) = gaussian(seed), gaussian(seed + 100)
    root = np.trace(linalg.sqrtm(cov_a @ cov_b)).real
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected, rel=1e-9)


def test_the_distance_is_symmetric():
    a, b = gaussian(2, rank=5), gaussian(3)
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-7)


def test_singular_covariances_need_no_regularisation():
    basis = orthogonal(4)
    a, b = np.zeros(F), np.zeros(F)
    a[:4], b[2:7] = [1, 2, 3, 4], [5, 6, 7, 8, 9]
    got = frechet_distance(np.zeros(F), (basis * a) @ basis.T, np.zeros(F), (basis * b) @ basis.T)
    assert got == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-6)
    zero = np.zeros((F, F))
    assert frechet_distance(np.zeros(F), zero, np.ones(F), zero) == F


def test_fewer_rows_than_features_still_have_a_distance_of_zero_to_themselves():
    fitted = statistics(np.random.default_rng(0).standard_normal((5, F)))
    assert frechet_distance(*fitted, *fitted) == pytest.approx(0, abs=1e-6)


def test_statistics_are_mean_and_unbiased_covariance_in_fp64():
    features = np.random.default_rng(0).standard_normal((50, F)).astype(np.float32)
    mean, cov = statistics(features)
    assert mean.dtype == cov.dtype == np.float64 and cov.shape == (F, F)
    wide = features.astype(np.float64)
    centred = wide - wide.sum(0) / 50
    assert np.allclose(mean, wide.sum(0) / 50, rtol=1e-13)
    assert np.allclose(cov, centred.T @ centred / 49, rtol=1e-12)


def test_statistics_of_one_feature_are_a_matrix():
    mean, cov = statistics(np.array([[1.0], [3.0]]))
    assert mean.tolist() == [2.0] and cov.tolist() == [[2.0]]


@pytest.mark.parametrize("shape", [(1, F), (0, F), (F,)])
def test_too_few_rows_are_refused(shape):
    with pytest.raises(ValueError, match="expected"):
        statistics(np.zeros(shape))
