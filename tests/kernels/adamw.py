"""Lists for adamw_ema, a step of it, and its formula."""

import functools
from copy import deepcopy

import torch

from repa_fast import ops
from repa_fast.testing import assert_within_budget, seeded
from tests.kernels.table import BF16, F32

DEFAULTS = {"lr": 1e-2, "grad_scale": 1.0, "skip": 0.0, "ema_rate": 1.0}
DEFAULTS |= {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
MOVED = ("params", "exp_avgs", "exp_avg_sqs", "emas")
SHAPES = ((3, 5), (7,), (), (2, 0, 3), (1, 1))
# A block of the kernels takes 8192 elements, a launch 320 tensors.
ODD_SHAPES = ((8191,), (8192,), (8193,), (0,), (1,), (3, 5, 7), (), (40_001,))

OPTIONS = (
    {},
    {"weight_decay": 0.1},
    {"betas": (0.5, 0.9), "eps": 1e-3},
    {"betas": (0.3, 0.95), "weight_decay": 0.5, "lr": 0.3},
    {"grad_scale": 0.125},
    {"ema_rate": 0.1},
    {"ema_rate": 1e-4, "weight_decay": 0.01, "grad_scale": 3.0, "lr": 1e-4},
)
KINDS = {
    "plain": {},
    "no average": {"averaged": False, "copies": True},
    "copies": {"copies": True},
    "bf16": {"dtypes": (BF16,)},
    "mixed": {"dtypes": (F32, BF16), "copies": True},
    "unaligned": {"offset": 1, "dtypes": (F32, BF16), "copies": True},
    "half aligned": {"offset": 2, "dtypes": (BF16, F32)},
}


def device(how):
    return "cuda" if how == "cuda" else "cpu"


def laid_out(values, how, offset=0, dtype=None):
    """`values` where they are needed, behind `offset` elements."""
    dtype = dtype or values.dtype
    whole = torch.zeros(values.numel() + offset, dtype=dtype, device=device(how))
    return whole[offset:].view(values.shape).copy_(values)


def make(shapes, how="auto", *, dtype=F32, averaged=True, copies=False, offset=0):
    """Lists for the op; parameters and averages random."""
    values = [seeded(shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    averages = [seeded(shape, seed=500 + i, dtype=dtype) for i, shape in enumerate(shapes)]
    zeros = [torch.zeros_like(value) for value in values]
    lists = {"params": values, "exp_avgs": zeros, "exp_avg_sqs": zeros, "emas": averages}
    if copies:
        lists["param_copies"] = [zero.bfloat16() for zero in zeros]
    if not averaged:
        del lists["emas"]
    lists = {name: [laid_out(v, how, offset) for v in lists[name]] for name in lists}
    return lists | {"steps": [torch.zeros((), device=device(how)) for _ in shapes]}


def make_gradients(shapes, step, how="auto", *, dtypes=(F32,), offset=0):
    """Random, in turn of the given dtypes, of scales from 1e-4 to 10."""
    grads = []
    for i, shape in enumerate(shapes):
        values = seeded(shape, seed=1000 + 100 * step + i, std=10.0 ** (i % 6 - 4))
        grads.append(laid_out(values, how, offset, dtypes[i % len(dtypes)]))
    return grads


def advance(lists, grads, how="auto", **options):
    """One step of the op; lr, grad_scale, skip and ema_rate are numbers."""
    options = DEFAULTS | options
    place = lists["params"][0].device if lists["params"] else device(how)
    for name in ("lr", "grad_scale", "skip", "ema_rate"):
        options[name] = torch.tensor(options[name], device=place)
    ops.adamw_ema(grads=grads, implementation=how, **lists, **options)


def formula(lists, grads, step, **options):
    """Algorithm 2 of arXiv 1711.05101 and an average, tensor by tensor, in the tensors' dtype.

    The numbers that the op takes in fp32 are rounded to it, everything else is a Python float.
    """
    options = DEFAULTS | options
    fp32 = (torch.tensor(options[name]).item() for name in ("lr", "grad_scale", "ema_rate"))
    lr, scale, rate = fp32
    b1, b2 = options["betas"]
    for i, grad in enumerate(grads):
        p, m, v = (lists[name][i] for name in ("params", "exp_avgs", "exp_avg_sqs"))
        g = grad.to(p.dtype) * scale
        p.sub_(p * (lr * options["weight_decay"]))
        m.copy_(b1 * m + (1 - b1) * g)
        v.copy_(b2 * v + (1 - b2) * g * g)
        m_hat, v_hat = m / (1 - b1**step), v / (1 - b2**step)
        p.sub_(lr * m_hat / (v_hat.sqrt() + options["eps"]))
        if "emas" in lists:
            lists["emas"][i].copy_((1 - rate) * lists["emas"][i] + rate * p)


def doubled(lists):
    return {name: [t.double() for t in lists[name]] for name in MOVED if name in lists}


assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)


def assert_follows_formula(how, shapes, steps, *, dtypes=(F32,), offset=0, **options):
    """`steps` steps of the op in fp32 against the formula in fp64, within the error budget.

    options: of `make` and of the op.
    """
    kind = {name: options.pop(name) for name in ("averaged", "copies") if name in options}
    actual = make(shapes, how, offset=offset, **kind)
    working, exact = deepcopy(actual), doubled(actual)
    for step in range(1, steps + 1):
        grads = make_gradients(shapes, step, how, dtypes=dtypes, offset=offset)
        untouched = deepcopy(grads)
        advance(actual, grads, how, **options)
        assert_equal(grads, untouched)
        formula(working, grads, step, **options)
        formula(exact, grads, step, **options)
    assert all(s.item() == steps for s in actual["steps"])
    for name in exact:
        flat = [torch.cat([t.flatten() for t in lists[name]]) for lists in (actual, exact, working)]
        assert_within_budget(name, *flat)
        for i, tensors in enumerate(zip(actual[name], exact[name], working[name], strict=True)):
            if tensors[0].numel() > 1000:  # errors of a few elements say little
                assert_within_budget(f"{name}[{i}]", *tensors)
    if "param_copies" in actual:
        for a, b in zip(actual["param_copies"], actual["params"], strict=True):
            assert torch.equal(a, b.bfloat16())


def assert_some_have_copies(how):
    """Steps of tensors of which every other has a copy, against those of all with copies."""
    some = make(ODD_SHAPES, how, copies=True)
    every, untouched = deepcopy(some), deepcopy(some)
    copies = some["param_copies"]
    some["param_copies"] = [c if i % 2 else None for i, c in enumerate(copies)]
    for step in (1, 2):
        for lists in (some, every):
            advance(lists, make_gradients(ODD_SHAPES, step, how, dtypes=(F32, BF16)), how)
    for name, tensors in some.items():
        for a, b, c in zip(tensors, every[name], untouched[name], strict=True):
            assert a is None or torch.equal(a, b)
            assert a is None or not a.numel() or not torch.equal(a, c)
