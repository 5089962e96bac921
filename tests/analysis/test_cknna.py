"""CKNNA against loops over pairs; CKA against double centring."""

import math

import numpy as np
import pytest
import torch

from repa_fast.analysis.cknna import DEFINITIONS, cka, neighbourhood
from repa_fast.testing import seeded
from tests.analysis.analysing import cknna
from tests.refusals import refused

CLOSE = 1e-12
"""fp64 sums of some 1e4 products, none of which cancels to less than 1e-3 of its terms."""


def related(rows, seed=0, widths=(6, 9)):
    """Two sets of features that share a part, (rows, 6) and (rows, 9), fp64."""
    shared = seeded((rows, 4), seed=seed, dtype=torch.float64, mean=0.2)
    return [
        shared @ seeded((4, width), seed=seed + 1 + n, dtype=torch.float64)
        + seeded((rows, width), seed=seed + 11 + n, dtype=torch.float64)
        for n, width in enumerate(widths)
    ]


def rotation(width, seed=5):
    matrix = np.random.default_rng(seed).standard_normal((width, width))
    return torch.from_numpy(np.linalg.qr(matrix)[0])


def unit(features):
    return features / features.square().sum(1, keepdim=True).sqrt()


def neighbours_by_loop(kernel, k):
    """The set of neighbours of each row; a stable sort keeps the earlier of equal ones first."""
    rows = range(len(kernel))
    return [set(sorted((j for j in rows if j != i), key=lambda j: -kernel[i, j])[:k]) for i in rows]


def align_by_loop(K, L, k, definition):
    """Align(K, L) from the formulas, pair by pair."""
    n = len(K)
    of_k, of_l = neighbours_by_loop(K, k), neighbours_by_loop(L, k)
    mask = np.array([[float(j in of_k[i] and j in of_l[i]) for j in range(n)] for i in range(n)])
    total = 0.0
    if definition == "paper":
        for i in range(n):
            for j in range(n):
                total += mask[i, j] * (K[i, j] - sum(K[i]) / n) * (L[i, j] - sum(L[i]) / n)
        return total
    K, L, one = mask * K, mask * L, np.ones(n)
    sums = (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
    return (np.trace(K @ L) + sums - 2 / (n - 2) * (one @ K @ L @ one)) / (n * (n - 3))


def cknna_by_loop(a, b, k, definition):
    K, L = (a @ a.T).numpy(), (b @ b.T).numpy()
    cross, of_k, of_l = (align_by_loop(*pair, k, definition) for pair in ((K, L), (K, K), (L, L)))
    return cross / math.sqrt(of_k * of_l)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("rows, k, chunk", [(12, 1, 1), (12, 11, 12), (30, 4, 7), (47, 10, 64)])
def test_it_is_the_sum_over_pairs_whatever_the_chunks(rows, k, chunk, definition, normalize):
    a, b = related(rows)
    got = cknna(a, b, k, definition=definition, normalize=normalize, chunk=chunk)
    if normalize:
        a, b = unit(a), unit(b)
    assert got == pytest.approx(cknna_by_loop(a, b, k, definition), rel=CLOSE, abs=CLOSE)


def test_rotations_and_scales_change_nothing_and_cka_is_blind_to_shifts_too():
    a, b = related(50)
    for definition in DEFINITIONS:
        assert cknna(a, a, definition=definition) == pytest.approx(1, rel=CLOSE)
        expected = cknna(a, b, definition=definition)
        moved = cknna(3 * a @ rotation(6), b @ rotation(9) / 7, definition=definition)
        assert moved == pytest.approx(expected, rel=CLOSE)
        assert 0 < expected < 0.95
    assert cka(a, 5 * a @ rotation(6) + torch.arange(6)) == pytest.approx(1, rel=CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_features_are_computed_with_in_fp64(dtype):
    a, b = (x.to(dtype) for x in related(50))
    assert cknna(a, b) == cknna(a.double(), b.double())
    assert cka(a, b) == cka(a.double(), b.double())


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_among_equal_values_the_earlier_rows_are_nearer(definition):
    generator = np.random.default_rng(0)
    a, b = (torch.from_numpy(generator.integers(-1, 2, (40, 4))).double() for _ in range(2))
    kernel = (a @ a.T).numpy()
    near = neighbourhood("a", a, 6, normalize=False, chunk=9).near
    expected = [sorted(row) for row in neighbours_by_loop(kernel, 6)]
    assert near.tolist() == expected
    later = kernel[::-1, ::-1]
    assert [{39 - j for j in row} for row in neighbours_by_loop(later, 6)][::-1] != [
        set(row) for row in expected
    ], "no ties in this data"
    got = cknna(a, b, 6, definition=definition, normalize=False)
    assert got == pytest.approx(cknna_by_loop(a, b, 6, definition), rel=CLOSE, abs=CLOSE)


@pytest.mark.parametrize("rows, widths", [(20, (6, 9)), (8, (30, 2))])
def test_cka_is_hsic_of_doubly_centred_kernels(rows, widths):
    a, b = related(rows, widths=widths)
    H = np.eye(rows) - np.ones((rows, rows)) / rows
    K, L = ((H @ (x @ x.T).numpy() @ H) for x in (a, b))
    expected = np.trace(K @ L) / math.sqrt(np.trace(K @ K) * np.trace(L @ L))
    assert cka(a, b) == pytest.approx(expected, rel=CLOSE)


def changed(row, value):
    a, _ = related(20)
    a[row] = value
    return a


A, B = related(20)
AXES = torch.eye(6, dtype=torch.float64)  # every inner product of two rows is zero


@pytest.mark.parametrize("call, message", [
    (lambda: cknna(A, B[:19], 3), r"\(20, 3\) and \(19, 3\)"),
    (lambda: cknna(A, B, 20), "k is 20, expected 1 <= k < 20"),
    (lambda: cknna(A, B, 0), "k is 0"),
    (lambda: cknna(changed(3, math.nan), B, 3), "a holds values that are not finite"),
    (lambda: cknna(B, changed(3, math.inf), 3), "b holds values that are not finite"),
    (lambda: cknna(torch.ones(20, 4), B, 3), "all 20 rows of a are equal"),
    (lambda: cknna(torch.zeros(20), B, 3), r"a has shape \(20,\)"),
    (lambda: cknna(torch.zeros(20, 4, dtype=torch.int64), B, 3), "dtype torch.int64"),
    (lambda: cknna(changed(7, 0.0), B, 3, normalize=True), "row 7 of a has length 0"),
    (lambda: cknna(A, B, definition="rbf"), "'rbf', expected one of paper, platonic"),
    (lambda: cknna(A[:3], B[:3], 1, definition="platonic"), "3 rows, expected at least 4"),
    (lambda: cknna(AXES, B[:6], 2, definition="platonic"), "of a with itself is 0"),
    (lambda: cka(A, B[:19]), "a has 20 rows, b has 19"),
    (lambda: cka(A, torch.full((20, 3), 0.1)), "all 20 rows of b are equal"),
    (lambda: cka(A, changed(0, math.nan)), "b holds values that are not finite"),
])  # fmt: skip
def test_bad_features_are_refused(call, message):
    refused(call, message)


def test_a_row_without_direction_is_refused_only_where_it_is_normalised():
    assert math.isfinite(cknna(changed(7, 0.0), B, 3))
