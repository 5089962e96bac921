"""Inputs and oracle of attention for its tests."""

import torch

from repa_fast.kernels.attention.selection import closed_form, error_and_bound
from repa_fast.testing import seeded

ON_CPU = ("sdpa", "sdpa-flash", "math", "reference")
# B, H, N, K
SHAPES = ((2, 2, 64, 72), (1, 3, 257, 64), (2, 3, 17, 7), (3, 2, 33, 1))
NAMES = ("out", "dq", "dk", "dv")


def inputs(shape, dtype=torch.float32):
    """q, k, v as a block has them, permuted views of one tensor, and dout."""
    batch, heads, tokens, head_dim = shape
    qkv = seeded((batch, tokens, 3, heads, head_dim), seed=1, dtype=dtype)
    return *qkv.permute(2, 0, 3, 1, 4).unbind(0), seeded(shape, seed=2, dtype=dtype)


def oracle(q, k, v, dout):
    """out, dq, dk, dv in fp64, written with einsum and autograd through exp and sum."""
    q, k, v, dout = (x.detach().double() for x in (q, k, v, dout))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    weights = (torch.einsum("bhik,bhjk->bhij", q, k) / q.shape[-1] ** 0.5).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.einsum("bhij,bhjk->bhik", weights, v)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def measured(run, q, k, v, dout):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = run(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def plain(q, k, v, dout):
    return closed_form(q, k, v, dout, work=torch.float32, stored=v.dtype)


def expect_budget(got, args):
    for name, actual, exact, formula in zip(NAMES, got, oracle(*args), plain(*args)):
        assert actual.dtype == formula.dtype and actual.shape == formula.shape
        error, bound = error_and_bound(actual, exact, formula)
        assert error <= bound, f"{name}: {error:.3e}, expected at most {bound:.3e}"
