"""Scores of generated images from features: inception score, precision and recall, KID, MMD.

All compute in fp64 on the device of the features, so that neither TF32 nor the cancellation in
squared distances shows. The Frechet distance is in `fid`.
"""

from collections.abc import Iterator

import torch

CHUNK = 4096
"""Rows and columns of distances at a time: 128 MiB in fp64, of which a few are held."""


def inception_score(logits: torch.Tensor, split_size: int = 5000) -> float:
    """exp(mean KL(p(y|x) || p(y))) of each split, averaged over splits (arXiv 1606.03498).

    The mean divergence of a split is the entropy of its mean posterior less the mean entropy of its
    posteriors.

    Args:
        logits: (N, classes), in the order of the images, which decides the splits.
        split_size: consecutive images per split; the last one may have fewer. 5,000 in ADM's
            evaluator, where 50,000 images make ten.

    Raises:
        ValueError: no images, or logits that are not finite.
    """
    _expect_features("logits", logits, 1)
    scores = []
    for split in logits.split(split_size):
        posterior = split.double().softmax(1)
        divergence = _entropy(posterior.mean(0)) - _entropy(posterior).mean()
        scores.append(divergence.exp())
    return torch.stack(scores).mean().item()


def _entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """In nats, over the last axis."""
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)


def precision_recall(
    real: torch.Tensor, generated: torch.Tensor, *, k: int = 3, chunk: int = CHUNK
) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991, equation 1).

    Precision is the share of generated images within the radius of at least one real image, a
    distance equal to the radius included; recall is the same with the two sets exchanged. The
    radius of an image is its distance to its k-th nearest neighbour in its own set, not counting
    itself but counting copies of it.

    ADM's evaluator computes distances in fp16 wherever these are finite, here they are in fp64; so
    values can differ where two distances nearly agree.

    Args:
        real: features (N, F), pool_3 of 10,000 reference images in ADM's evaluator.
        generated: features (M, F) on the same device.
        k: which neighbour.
        chunk: rows and columns of distances at a time.

    Raises:
        ValueError: k images or fewer in a set, other shapes, or features that are not finite.
    """
    _expect_pair(real, generated, k + 1)
    precision = _covered(generated, real, _squared_radii(real, k, chunk), chunk)
    recall = _covered(real, generated, _squared_radii(generated, k, chunk), chunk)
    return precision, recall


def _squared_radii(features: torch.Tensor, k: int, chunk: int) -> torch.Tensor:
    """Squared distance (N) of each row to its k-th nearest other row."""
    radii = []
    for start, rows in _chunks(features, chunk):
        nearest = features.new_full((len(rows), k), torch.inf, dtype=torch.float64)
        for first, columns in _chunks(features, chunk):
            distances = _squared_distances(rows, columns)
            if first == start:
                distances.fill_diagonal_(torch.inf)
            nearest = torch.cat([nearest, distances], 1).topk(k, largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def _covered(
    queries: torch.Tensor, centres: torch.Tensor, squared_radii: torch.Tensor, chunk: int
) -> float:
    """Share of queries (N, F) within the radius (M) of at least one of the centres (M, F)."""
    covered = 0
    for _, rows in _chunks(queries, chunk):
        inside = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for first, columns in _chunks(centres, chunk):
            radii = squared_radii[first : first + chunk]
            inside |= (_squared_distances(rows, columns) <= radii).any(1)
        covered += int(inside.sum())
    return covered / len(queries)


def kid(
    real: torch.Tensor,
    generated: torch.Tensor,
    *,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Kernel inception distance (arXiv 1801.01401): its mean and standard deviation over subsets.

    The unbiased estimate of MMD^2 with the kernel (x.y / F + 1)^3, so it can be negative.

    Args:
        real, generated: features (N, F) and (M, F) on one device, pool_3 by custom.
        subsets: how many pairs of random subsets.
        size: images of a subset, drawn without repetition.
        seed: of the subsets.

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
    """The mean of `_cubic(x, x)` outside its diagonal."""
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
    """scale * MMD^2 with the kernel exp(-|x - y|^2 / (2 sigma^2)), as CMMD has (arXiv 2401.09603).

    The estimate is the one of least variance, in which an image is also compared with itself
    (Gretton et al. 2012, equation 5), as in the authors' program: never negative, and 0 for equal
    sets. CMMD's features are CLIP's image embeddings of length 1, for which sigma is meant.

    Args:
        real, generated: features (N, F) and (M, F) on one device.

    Raises:
        ValueError: no images, other shapes, or features that are not finite.
    """
    _expect_pair(real, generated, 1)

    def mean_kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        total = x.new_zeros((), dtype=torch.float64)
        for _, rows in _chunks(x, chunk):
            for _, columns in _chunks(y, chunk):
                total += _squared_distances(rows, columns).mul_(-0.5 / sigma**2).exp_().sum()
        return total.item() / (len(x) * len(y))

    own = mean_kernel(real, real) + mean_kernel(generated, generated)
    return scale * (own - 2 * mean_kernel(real, generated))


def _chunks(features: torch.Tensor, chunk: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(index of the first row, rows in fp64) of consecutive chunks."""
    for start in range(0, len(features), chunk):
        yield start, features[start : start + chunk].double()


def _squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """|x_i - y_j|^2, fp64 (N, M), of fp64 rows; 0 where rounding alone could make it so.

    As |x|^2 + |y|^2 - 2 x.y, whose rounding error is at most about F eps (|x|^2 + |y|^2). Copies
    must be at distance 0: their radii are 0 where there are more than k.
    """
    squares = x.square().sum(1)[:, None] + y.square().sum(1)
    distances = torch.addmm(squares, x, y.T, alpha=-2)
    squares *= x.shape[1] * torch.finfo(torch.float64).eps
    return distances.masked_fill_(distances <= squares, 0)


def _expect_pair(real: torch.Tensor, generated: torch.Tensor, at_least: int) -> None:
    for name, features in (("real", real), ("generated", generated)):
        _expect_features(f"{name} features", features, at_least)
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
