"""How alike two sets of features see the same images: CKNNA in two definitions, and linear CKA.

CKNNA (REPA, arXiv 2410.06940, appendix C.1, after arXiv 2405.07987) compares only pairs of images
that are near each other for both. The text defines it one way, the code released with the metric
computes another quantity; which of them REPA plotted is not known, so both are here.

Everything is computed in fp64, on the device of the features.
Shapes: N images, F and G widths; row i of both sets belongs to image i.
"""

import math
from typing import NamedTuple

import torch

from repa_fast.contracts import expect_choice, expect_floating

DEFINITIONS = ("paper", "platonic")
CHUNK = 512
"""Rows of the kernel matrix that exist at once: 41 MB for 10,000 images."""
PAIRS = 8192
"""Pairs whose inner products are taken at once."""


class Neighbourhood(NamedTuple):
    """Features fp64 (N, F) and, for each row, its k nearest other rows, int64 (N, k), ascending."""

    features: torch.Tensor
    near: torch.Tensor


def neighbourhood(
    name: str, features: torch.Tensor, k: int = 10, *, normalize: bool, chunk: int = CHUNK
) -> Neighbourhood:
    """Find the k nearest rows of every row: those of the largest inner products.

    Args:
        name: what messages call the features.
        features: (N, F), any floating dtype.
        k: neighbours of a row. Among equal inner products the earlier rows are nearer.
        normalize: scale rows to length 1 first; so the platonic definition is published.
        chunk: rows of the kernel matrix computed at once; without effect on the result.

    Raises:
        ValueError: features that are not (N, F) with N > k >= 1, not finite, all equal, or of
            length 0 where they are normalised.
    """
    features = _checked(name, features)
    rows = len(features)
    if not 1 <= k < rows:
        raise ValueError(f"k is {k}, expected 1 <= k < {rows}, the rows of {name}")
    if normalize:
        lengths = features.norm(dim=1, keepdim=True)
        if not lengths.all():
            row = int((lengths == 0).nonzero()[0, 0])
            raise ValueError(f"row {row} of {name} has length 0, expected rows to normalise")
        features = features / lengths
    starts = range(0, rows, chunk)
    near = [_nearest(features, k, start, min(start + chunk, rows)) for start in starts]
    return Neighbourhood(features, torch.cat(near))


def alignment(a: Neighbourhood, b: Neighbourhood, definition: str) -> float:
    """Compute CKNNA, Align(K, L) / sqrt(Align(K, K) Align(L, L)), K_ij = <a_i, a_j>, L of b.

    m(i, j) = 1 iff j != i is among the k nearest of i, the largest K_ij, and also among the k
    largest L_ij. In Align(K, K) and Align(L, L) that is one kernel's own neighbours.

    "paper" (REPA eq. 23 and 24) takes the mean of each whole row from the kernels:

        Align(K, L) = sum_ij m(i, j) (K_ij - mean_l K_il) (L_ij - mean_l L_il)

    "platonic" is the unbiased HSIC (Song et al. 2012, JMLR 13, eq. 5) of K~ = m K and L~ = m L:

        Align(K, L) = [tr(K~ L~) + (1'K~1) (1'L~1) / ((N - 1) (N - 2)) - 2 / (N - 2) 1'K~L~1]
                      / (N (N - 3))

    m need not be symmetric, and then this one is not symmetric in a and b.

    Returns:
        1 for equal features; at most 1 under "paper".

    Raises:
        ValueError: an unknown definition, another N or k, fewer than 4 rows under "platonic", or
            features that are not aligned with themselves.
    """
    expect_choice("definition", definition, DEFINITIONS)
    if a.near.shape != b.near.shape:
        raise ValueError(
            f"neighbourhoods have shapes {tuple(a.near.shape)} and {tuple(b.near.shape)}, "
            "expected one (N, k)"
        )
    if definition == "platonic" and len(a.near) < 4:
        raise ValueError(f"cknna: {len(a.near)} rows, expected at least 4 for the unbiased HSIC")
    align = _centred_products if definition == "paper" else _unbiased_hsic
    return _normalised(align(a, b), align(a, a), align(b, b))


def cka(a: torch.Tensor, b: torch.Tensor) -> float:
    """Compute linear CKA (arXiv 1905.00414, section 3), HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)).

    HSIC(K, L) = tr(K H L H) / (N - 1)^2, H = I - 11'/N, the biased estimator: rows and columns of
    the kernels lose their means. With the columns of a and b centred, tr(K H L H) = |a'b|_F^2, so
    no N x N matrix is needed.

    Args:
        a, b: (N, F) and (N, G), any floating dtype, on one device.

    Returns:
        From 0 to 1; 1 for features that differ by a rotation, a scale and a shift.

    Raises:
        ValueError: shapes that are not (N, F) and (N, G), features not finite or all equal.
    """
    a, b = _checked("a", a), _checked("b", b)
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} rows, b has {len(b)}, expected as many")
    a, b = a - a.mean(0), b - b.mean(0)
    return _normalised(*((x.T @ y).square().sum() for x, y in ((a, b), (a, a), (b, b))))


def _checked(name: str, features: torch.Tensor) -> torch.Tensor:
    """Return the features in fp64, or raise ValueError if they are no good ones."""
    if features.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(features.shape)}, expected (rows, width)")
    expect_floating("features", name, features)
    if not features.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite, expected finite features")
    if (features == features[:1]).all():
        raise ValueError(f"all {len(features)} rows of {name} are equal, expected different ones")
    return features.double()


def _nearest(features: torch.Tensor, k: int, start: int, stop: int) -> torch.Tensor:
    """Return (stop - start, k), the nearest rows of rows start..stop - 1, ascending."""
    kernel = features[start:stop] @ features.T  # (chunk, N)
    kernel.diagonal(start).fill_(-math.inf)
    last = kernel.topk(k, dim=1).values[:, -1:]
    nearer = kernel > last
    tied = kernel == last
    places = k - nearer.sum(1, keepdim=True)
    chosen = nearer | (tied & (tied.cumsum(1, dtype=torch.int32) <= places))
    return chosen.nonzero()[:, 1].view(-1, k)


def _pairs(a: Neighbourhood, b: Neighbourhood) -> tuple[torch.Tensor, torch.Tensor]:
    """Return i and j of the pairs with m(i, j) = 1, int64 (E) each, at most N * k."""
    rows = torch.arange(len(a.near), device=a.near.device)[:, None] * len(a.near)
    numbers = (rows + a.near).flatten()
    numbers = numbers[torch.isin(numbers, (rows + b.near).flatten())]
    return numbers // len(a.near), numbers % len(a.near)


def _inner_products(features: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """Return the kernel at the pairs, (E)."""
    parts = zip(i.split(PAIRS), j.split(PAIRS), strict=True)
    return torch.cat([(features[rows] * features[columns]).sum(1) for rows, columns in parts])


def _centred_products(a: Neighbourhood, b: Neighbourhood) -> torch.Tensor:
    i, j = _pairs(a, b)
    product = 1.0
    for features, _ in (a, b):
        row_means = features @ features.mean(0)
        product = product * (_inner_products(features, i, j) - row_means[i])
    return product.sum()


def _unbiased_hsic(a: Neighbourhood, b: Neighbourhood) -> torch.Tensor:
    """Compute it times N (N - 3), which every term of the quotient has."""
    i, j = _pairs(a, b)
    n = len(a.near)
    k, l = _inner_products(a.features, i, j), _inner_products(b.features, i, j)
    both_ways = torch.isin(i * n + j, j * n + i)  # m(i, j) = m(j, i) = 1; there L_ji = L_ij
    trace = (k * l)[both_ways].sum()
    columns_of_k = k.new_zeros(n).index_add(0, j, k)
    rows_of_l = l.new_zeros(n).index_add(0, i, l)
    return trace + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * columns_of_k @ rows_of_l


def _normalised(cross: torch.Tensor, of_a: torch.Tensor, of_b: torch.Tensor) -> float:
    for name, own in (("a", of_a), ("b", of_b)):
        if not own > 0:
            raise ValueError(
                f"the alignment of {name} with itself is {own.item():.3g}, expected a positive one"
            )
    return (cross / (of_a.sqrt() * of_b.sqrt())).item()
