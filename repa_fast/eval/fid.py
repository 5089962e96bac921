"""Frechet distance between Gaussians fitted to features (arXiv 1706.08500)."""

import numpy as np


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (F) and covariance (F, F), fp64, of features (N, F).

    Raises:
        ValueError: fewer than two rows.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features have shape {features.shape}, expected (N, F) with N >= 2")
    features = features.astype(np.float64)
    return features.mean(0), np.cov(features, rowvar=False).reshape(features.shape[1], -1)


def frechet_distance(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)).

    The trace of the root comes from the symmetric cov_a^(1/2) cov_b cov_a^(1/2), whose eigenvalues
    are real and, up to rounding, not negative; so singular covariances need no regularisation.

    Args:
        mean_a, mean_b: (F).
        cov_a, cov_b: (F, F), symmetric.

    Raises:
        ValueError: other shapes, as of different features.
    """
    shapes, width = [array.shape for array in (mean_a, cov_a, mean_b, cov_b)], mean_a.size
    if shapes != [(width,), (width, width)] * 2:
        raise ValueError(f"means and covariances are {shapes}, expected (F), (F, F), (F), (F, F)")
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    trace_root = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    difference = mean_a - mean_b
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_root)
