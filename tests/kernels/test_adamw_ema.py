import itertools
import math
from copy import deepcopy

import pytest
import torch

from repa_fast import ops
from repa_fast.backend import extension
from repa_fast.kernels.adamw_ema.cuda import adamw_ema_cuda
from repa_fast.testing import assert_within_budget, seeded
from tests.kernels.adamw import (
    KINDS,
    MOVED,
    ODD_SHAPES,
    OPTIONS,
    SHAPES,
    advance,
    assert_equal,
    assert_follows_formula,
    assert_some_have_copies,
    device,
    doubled,
    formula,
    make,
    make_gradients,
)
from tests.kernels.table import BF16, F32, F64
from tests.refusals import refused

CPU = torch.device("cpu")


@pytest.fixture(params=["reference", pytest.param("cuda", marks=pytest.mark.gpu)])
def how(request):
    """The implementation; its tensors are on its device."""
    if request.param == "cuda":
        request.getfixturevalue("cuda")
    return request.param


# Both implementations.


@pytest.mark.parametrize("options", (*OPTIONS, {"betas": (0.0, 0.95)}), ids=str)
def test_reference_in_fp64_equals_the_formula(options):
    """0-d tensors are taken for the numbers that they hold in fp32; all else is fp64."""
    shapes = ((2, 3), (1,))
    lists = make(shapes, dtype=F64)
    exact = deepcopy(lists)
    for step in range(1, 8):
        grads = make_gradients(shapes, step, dtypes=(F64,))
        advance(lists, grads, "reference", **options)
        formula(exact, grads, step, **options)
    for name in MOVED:
        torch.testing.assert_close(lists[name], exact[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("averaged", (True, False))
def test_every_option_is_that_of_the_formula_within_budget(how, options, averaged):
    assert_follows_formula(how, ODD_SHAPES, 10, averaged=averaged, copies=True, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tensor_follows_the_formula_for_long(how, kind):
    options = {"weight_decay": 0.1, "ema_rate": 0.01, "grad_scale": 0.3}
    steps = 100 if how == "cuda" else 5
    assert_follows_formula(how, ODD_SHAPES, steps, **KINDS[kind], **options)


def test_tensors_with_a_copy_and_without_are_stepped_together(how):
    assert_some_have_copies(how)


def test_first_update_of_a_weight_at_zero_is_as_exact_as_fp32(how):
    """Where the weight does not hide it, the bias correction's own error shows."""
    lists, grads = make(((64,),), how), make_gradients(((64,),), 1, how)
    lists["params"][0].zero_()
    working, exact = deepcopy(lists), doubled(lists)
    advance(lists, grads, how)
    formula(working, grads, 1)
    formula(exact, grads, 1)
    assert_within_budget("params", *(x["params"][0] for x in (lists, exact, working)))


def test_the_budget_sees_a_beta_wrong_by_a_percent():
    wrong = make(((50,),))
    exact, working = doubled(wrong), deepcopy(wrong)
    for step in (1, 2):
        grads = make_gradients(((50,),), step)
        advance(wrong, grads, betas=(0.909, 0.999))
        formula(exact, grads, step)
        formula(working, grads, step)
    for name in ("params", "exp_avgs", "emas"):
        with pytest.raises(AssertionError, match="expected at most"):
            assert_within_budget(name, *(x[name][0] for x in (wrong, exact, working)))


def test_nothing_beside_a_view_is_written(how):
    flat = torch.full((8192 + 5,), 7.0, device=device(how))
    lists = make(((8192 + 3,),), how)
    lists["params"] = [flat[1:-1]]
    advance(lists, make_gradients(((8192 + 3,),), 1, how), how)
    assert flat[0] == 7 and flat[-1] == 7 and (flat[1:-1] != 7).all()


def test_step_counts_are_each_tensors_own():
    lists = make(((4,), (4,)))
    lists["params"][1].copy_(lists["params"][0])
    lists["steps"][1].fill_(9)
    grad = seeded((4,), seed=3)
    before = lists["params"][0].clone()
    advance(lists, [grad, grad.clone()])
    assert [s.item() for s in lists["steps"]] == [1, 10]
    moved = [(p - before).abs() for p in lists["params"]]
    ratio = math.sqrt((1 - 0.999**10) / (1 - 0.999)) * (1 - 0.9) / (1 - 0.9**10)
    torch.testing.assert_close(moved[1], moved[0] * ratio, rtol=1e-3, atol=1e-6)


def test_skip_is_anything_but_zero_and_changes_nothing_whatever_the_gradients_are(how):
    poisons = (0.0, math.inf, -math.inf, math.nan)
    cases = [(1.0, *pair) for pair in itertools.product(poisons, (1.0, math.nan, math.inf))]
    cases += [(skip, 0.0, 1.0) for skip in (2.0, 0.5, -1.0, math.nan)]
    for skip, poison, scale in cases:
        lists = make(SHAPES, how, copies=True)
        advance(lists, make_gradients(SHAPES, 1, how), how)
        before = deepcopy(lists)
        grads = [g + poison for g in make_gradients(SHAPES, 2, how)]
        options = {"weight_decay": 0.1, "ema_rate": 0.5}
        advance(lists, grads, how, skip=skip, grad_scale=scale, **options)
        assert_equal(lists, before)


def test_non_finite_gradients_without_skip_reach_their_own_element_only():
    lists = make(((4,), (3,)))
    grads = make_gradients(((4,), (3,)), 1)
    grads[0][2] = math.nan
    advance(lists, grads)
    assert lists["params"][0].isnan().tolist() == [False, False, True, False]
    assert lists["params"][1].isfinite().all()


@pytest.mark.parametrize("decay", (0.9999, 0.995, 0.9, 0.3, 0.0))
def test_the_rate_of_an_average_has_the_bits_that_a_number_would_have(decay):
    """1 - decay is taken in fp64 and rounded once to fp32, as torch rounds a Python number."""
    lists = make(ODD_SHAPES)
    before = deepcopy(lists["emas"])
    advance(lists, make_gradients(ODD_SHAPES, 1), ema_rate=1 - decay)
    moved = [a + (1 - decay) * (p - a) for a, p in zip(before, lists["params"], strict=True)]
    assert_equal(lists["emas"], moved)


def test_empty_lists_and_empty_tensors_are_accepted(how):
    advance(make((), how), [])
    shapes = ((0,), (3, 0), (0,))
    lists = make(shapes, how, copies=True)
    advance(lists, make_gradients(shapes, 1, how), how)
    assert [s.item() for s in lists["steps"]] == [1, 1, 1]


def test_leaves_are_updated_in_place_and_their_stale_use_raises(how):
    lists = make(((3,),), how)
    leaf = lists["params"][0].requires_grad_()
    address, loss = leaf.data_ptr(), leaf.square().sum()
    advance(lists, make_gradients(((3,),), 1, how), how)
    assert leaf.requires_grad and leaf.grad_fn is None and leaf.data_ptr() == address
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_sum_of_squares_is_that_in_fp64_and_the_same_every_time(how):
    tensors = make_gradients((*ODD_SHAPES, *((17,),) * 330), 1, how, dtypes=(F32, BF16))
    tensors += make_gradients(((1001,),), 2, how, offset=1)
    place = torch.device(device(how), 0)
    exact = sum(t.double().square().sum() for t in tensors)
    found = [ops.sum_of_squares(tensors, place, implementation=how) for _ in range(5)]
    assert found[0].item() == pytest.approx(exact.item(), rel=1e-6)
    assert all(torch.equal(f, found[0]) for f in found)
    empty = torch.ones(0, device=place)
    for nothing in ([], [empty], [empty.bfloat16(), torch.ones(3, 0, device=place)]):
        found.append(ops.sum_of_squares(nothing, place, implementation=how))
        assert found[-1].item() == 0
    assert {(f.dtype, f.shape) for f in found} == {(F64, ())}


def test_sum_of_squares_of_non_finite_values_is_not_finite():
    for value in (math.inf, -math.inf, math.nan):
        tensors = [torch.ones(5), torch.tensor([1.0, value], dtype=BF16)]
        assert not ops.sum_of_squares(tensors, CPU).isfinite()


# Refusals.


@pytest.mark.parametrize(
    "name, wrong",
    [("steps", "length")]
    + [(name, of) for name in ("grads", *MOVED[1:], "param_copies") for of in ("length", "shape")],
)
def test_lists_that_do_not_fit_are_refused_by_name_and_nothing_changes(name, wrong):
    lists = make(SHAPES, copies=True) | {"grads": make_gradients(SHAPES, 1)}
    if wrong == "length":
        lists[name] = lists[name][:-1]
        words = f"adamw_ema: {name} has 4 tensors, expected 5"
    else:
        lists[name] = [lists[name][0].reshape(5, 3), *lists[name][1:]]
        words = rf"{name} has shape \(5, 3\), expected \(3, 5\)"
    before, grads = deepcopy(lists), lists.pop("grads")
    refused(lambda: advance(lists, grads), words)
    assert_equal(lists | {"grads": grads}, before)


def test_averages_without_their_rate_are_refused_and_none_needs_none():
    one, grads = torch.ones(()), make_gradients(SHAPES, 1)
    options = {"lr": one, "grad_scale": one, "skip": 0 * one, "betas": (0.9, 0.99), "eps": 1e-8}

    def step(lists):
        ops.adamw_ema(grads=grads, weight_decay=0.1, **lists, **options)

    refused(lambda: step(make(SHAPES)), "emas are given without ema_rate")
    lists = make(SHAPES, averaged=False)
    step(lists)
    assert [s.item() for s in lists["steps"]] == [1] * len(SHAPES)


@pytest.mark.parametrize(
    "how, words",
    (("cuda", "but the tensors are on cpu"), ("triton", "expected one of auto, cuda, reference")),
)
def test_what_cannot_run_on_the_cpu_is_refused(how, words):
    lists, grads = make(SHAPES), make_gradients(SHAPES, 1)
    words = f"implementation is '{how}', {words}"
    refused(lambda: advance(lists, grads, how), f"adamw_ema: {words}")
    refused(lambda: ops.sum_of_squares(grads, CPU, implementation=how), f"squares: {words}")


def test_why_not_cuda_names_the_device_then_the_library(monkeypatch, tmp_path):
    assert ops.why_not_cuda(CPU) == "the tensors are on cpu"
    library = tmp_path / extension.LIBRARY.name
    monkeypatch.setattr(extension, "LIBRARY", library)
    why_not = extension.why_not.__wrapped__  # the answer for the real library stays cached
    assert "is not built (python setup.py build_ext" in why_not()
    library.write_bytes(b"not a library")
    assert "does not load: " in why_not()


# What the operator is given, and what autograd is told of it.


@pytest.fixture
def calls(monkeypatch):
    """What a stand-in for the operator gets; it changes what it writes, unnoticed by autograd."""
    calls = []

    def operator(params, grads, *rest):
        for tensor in itertools.chain(params, *rest[:5]):
            tensor.data.add_(1)
        calls.append(rest[5:])

    monkeypatch.setattr(torch.ops.repa_fast, "adamw_ema", operator, raising=False)
    return calls


def call_cuda(lists, grads):
    one = torch.ones(())
    options = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "ema_rate": one / 2}
    adamw_ema_cuda(**lists, grads=grads, lr=one, grad_scale=one, skip=0 * one, **options)


@pytest.mark.parametrize("name", (*MOVED, "param_copies", "steps"))
def test_a_stale_use_of_what_the_operator_wrote_raises(calls, name):
    lists = make(((3,),), copies=True)
    used = lists[name][0].requires_grad_()
    silent, loss = used.square().sum(), used.square().sum()
    torch.ops.repa_fast.adamw_ema([used], [])
    silent.backward()
    call_cuda(lists, make_gradients(((3,),), 1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert len(calls) == 2


def test_the_operator_gets_every_option_and_gradients_keep_their_version(calls):
    lists, grads = make(SHAPES, copies=True), make_gradients(SHAPES, 1)
    versions = [g._version for g in grads]
    call_cuda(lists, grads)
    *scalars, factors, beta1, beta2, eps, weight_decay = calls[0]
    assert [s.item() for s in scalars] == [1, 1, 0, 0.5]
    assert factors.dtype == F32 and factors.shape == (2 * len(SHAPES),)
    assert (beta1, beta2, eps, weight_decay) == (0.9, 0.99, 1e-8, 0.1)
    assert [g._version for g in grads] == versions
    call_cuda(make((), copies=True), [])
    assert len(calls) == 1
