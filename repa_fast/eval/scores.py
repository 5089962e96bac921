"""Scores of generated images from features: Frechet distance, inception score, KID, MMD, and
precision and recall.

All compute in fp64, those of tensors on the tensors' device, so that neither TF32 nor the
cancellation in squared distances shows.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch

CHUNK = 4096
"""Rows and columns of distances at a time: 128 MiB in fp64, of which a few are held."""


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean (F) and covariance (F, F), fp64, of features (N, F).

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
    """Compute |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)) (arXiv 1706.08500).

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


def inception_score(logits: torch.Tensor, split_size: int = 5000) -> float:
    """Compute exp(mean KL(p(y|x) || p(y))), averaged over splits (arXiv 1606.03498).

    The mean divergence of a split is the entropy of its mean posterior less the mean entropy of its
    posteriors.

    Args:
        logits: (N, classes), in the order of the images, which decides the splits.
        split_size: consecutive images per split, ADM's 5,000; the last one may have fewer.

    Raises:
        ValueError: no images, or logits that are not finite.
    """
    _expect_features("logits", logits, 1)
    scores = []
    for split in logits.split(split_size):
        posterior = split.double().softmax(1)
        of_mean, of_each = (torch.special.entr(p).sum(-1) for p in (posterior.mean(0), posterior))
        scores.append((of_mean - of_each.mean()).exp())
    return torch.stack(scores).mean().item()


def class_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of images whose largest logit (N, classes) is that of their label (N).

    Raises:
        ValueError: no images, other shapes, or logits that are not finite.
    """
    _expect_features("logits", logits, 1)
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, expected ({len(logits)},)")
    return (logits.argmax(1) == labels.to(logits.device)).double().mean().item()


def precision_recall(
    real: torch.Tensor, generated: torch.Tensor, *, k: int = 3, chunk: int = CHUNK
) -> tuple[float, float]:
    """Compute improved precision and recall (arXiv 1904.06991, equation 1).

    Precision is the share of generated images within the radius (or on it) of at least one real
    image; recall is the same with the two sets exchanged. The radius of an image is its distance to
    its k-th nearest neighbour in its own set, counting copies of it but not itself. ADM's evaluator
    computes distances in fp16 where these are finite, here they are in fp64.

    Args:
        real: features (N, F), pool_3 of 10,000 reference images in ADM's evaluator.
        generated: features (M, F) on the same device.
        chunk: rows and columns of distances at a time.

    Raises:
        ValueError: k images or fewer in a set, other shapes, or features that are not finite.
    """
    _expect_pair(real, generated, k + 1)
    precision = _covered(generated, real, _squared_radii(real, k, chunk), chunk)
    recall = _covered(real, generated, _squared_radii(generated, k, chunk), chunk)
    return precision, recall


def _squared_radii(features: torch.Tensor, k: int, chunk: int) -> torch.Tensor:
    """Return the squared distance (N) of each row to its k-th nearest other row."""
    nearest = features.new_full((len(features), k), torch.inf, dtype=torch.float64)
    for rows, columns, distances in _squared_distances(features, features, chunk):
        if rows == columns:
            distances.fill_diagonal_(torch.inf)
        nearer = torch.cat([nearest[rows], distances], 1)
        nearest[rows] = nearer.topk(k, largest=False).values
    return nearest[:, -1]


def _covered(
    queries: torch.Tensor, centres: torch.Tensor, squared_radii: torch.Tensor, chunk: int
) -> float:
    """Return the share of queries (N, F) within the radius (M) of at least one centre (M, F)."""
    inside = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
    for rows, columns, distances in _squared_distances(queries, centres, chunk):
        inside[rows] |= (distances <= squared_radii[columns]).any(1)
    return int(inside.sum()) / len(queries)


def kid(
    real: torch.Tensor,
    generated: torch.Tensor,
    *,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Compute the kernel inception distance (arXiv 1801.01401): mean and deviation over subsets.

    It is the unbiased estimate of MMD^2 with the kernel (x.y / F + 1)^3, so it can be negative.

    Args:
        real, generated: features (N, F) and (M, F) on one device, pool_3 by custom.
        subsets: how many pairs of random subsets, which `seed` decides.
        size: images of a subset, drawn without repetition.

    Raises:
        ValueError: fewer than `size` images in a set, other shapes, or features not finite.
    """
    _expect_pair(real, generated, size)
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        x, y = (
            of[torch.randperm(len(of), generator=generator)[:size].to(of.device)].double()
            for of in (real, generated)
        )
        values.append(_mean_of_others(x) + _mean_of_others(y) - 2 * _cubic(x, y).mean())
    estimates = torch.stack(values)
    return estimates.mean().item(), estimates.std(correction=0).item()


def _cubic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_of_others(x: torch.Tensor) -> torch.Tensor:
    """Return the mean of `_cubic(x, x)` outside its diagonal."""
    diagonal = (x.square().sum(1) / x.shape[1] + 1) ** 3
    return (_cubic(x, x).sum() - diagonal.sum()) / (len(x) * (len(x) - 1))


def mmd_rbf(
    real: torch.Tensor,
    generated: torch.Tensor,
    *,
    sigma: float = 10.0,
    scale: float = 1000.0,
    chunk: int = CHUNK,
) -> float:
    """Compute scale * MMD^2 with the kernel exp(-|x - y|^2 / (2 sigma^2)), as CMMD (2401.09603).

    An image is also compared with itself (Gretton et al. 2012, equation 5), as in the authors'
    program: never negative, and 0 for equal sets. Sigma is meant for features of length 1.

    Args:
        real, generated: features (N, F) and (M, F) on one device.

    Raises:
        ValueError: no images, other shapes, or features that are not finite.
    """
    _expect_pair(real, generated, 1)

    def mean_kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        total = x.new_zeros((), dtype=torch.float64)
        for _, _, distances in _squared_distances(x, y, chunk):
            total += distances.mul_(-0.5 / sigma**2).exp_().sum()
        return total.item() / (len(x) * len(y))

    own = mean_kernel(real, real) + mean_kernel(generated, generated)
    return scale * (own - 2 * mean_kernel(real, generated))


def _squared_distances(
    x: torch.Tensor, y: torch.Tensor, chunk: int
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Yield (rows, columns, |x_i - y_j|^2 of these, fp64); 0 where rounding could make it so.

    Computed as |x|^2 + |y|^2 - 2 x.y, whose rounding error is at most about F eps (|x|^2 + |y|^2).
    Copies must be at distance 0: their radii are 0 where there are more than k.
    """
    for i, j in itertools.product(range(0, len(x), chunk), range(0, len(y), chunk)):
        rows, columns = slice(i, i + chunk), slice(j, j + chunk)
        a, b = x[rows].double(), y[columns].double()
        squares = a.square().sum(1)[:, None] + b.square().sum(1)
        distances = torch.addmm(squares, a, b.T, alpha=-2)
        squares *= x.shape[1] * torch.finfo(torch.float64).eps
        yield rows, columns, distances.masked_fill_(distances <= squares, 0)


def _expect_pair(real: torch.Tensor, generated: torch.Tensor, at_least: int) -> None:
    _expect_features("real features", real, at_least)
    _expect_features("generated features", generated, at_least)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"real features have width {real.shape[1]}, generated {generated.shape[1]}, "
            "expected the same"
        )


def _expect_features(name: str, features: torch.Tensor, at_least: int) -> None:
    if features.ndim != 2 or len(features) < at_least:
        raise ValueError(
            f"{name} have shape {tuple(features.shape)}, expected (N, F) with N >= {at_least}"
        )
    if not features.isfinite().all():
        raise ValueError(f"{name} are not all finite")
