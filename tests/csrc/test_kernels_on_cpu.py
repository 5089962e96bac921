"""csrc's kernels on a CPU, under sanitizers: their numbers, and faults that are planted in them."""

from copy import deepcopy

import pytest
import torch

from repa_fast import ops
from repa_fast.kernels.adamw_ema import op
from tests.csrc.on_cpu import HEADER, Operators, compiled, why_not
from tests.kernels.adamw import (
    KINDS,
    ODD_SHAPES,
    OPTIONS,
    advance,
    assert_equal,
    assert_follows_formula,
    assert_some_have_copies,
    laid_out,
    make,
    make_gradients,
)
from tests.kernels.table import BF16, F32
from tests.train.adamw import assert_implementations_agree

REASON = why_not()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.xdist_group("csrc"),  # one worker compiles
]
CPU = torch.device("cpu")
SIZES = (*ODD_SHAPES[:-1], (3,), (4,))
SMALL = ((8195,), (0,), (5,))
MANY = (*[(0,)] * 317, (5,), (3,), (8,), (9,), (0,), (8193,))
"""Tensors for two launches, of which few have blocks; the second begins with one of 9 elements."""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("csrc"), HEADER.read_text())


@pytest.fixture
def install(monkeypatch):
    """install(program, fault): on a CPU too, "auto" and "cuda" are the kernels, which it runs."""

    def into_the_op(program, fault=0):
        operators = Operators(program, fault)
        for name in ("adamw_ema", "sum_of_squares"):
            monkeypatch.setattr(torch.ops.repa_fast, name, getattr(operators, name), raising=False)
        for module in (op, ops):
            monkeypatch.setattr(module, "why_not_cuda", lambda device: "")

    return into_the_op


@pytest.fixture
def on_cpu(install, program):
    install(program)


def step(shapes=SMALL, **options):
    assert_follows_formula("auto", shapes, 2, **{"copies": True, "ema_rate": 0.1} | options)


def step_with_unaligned_emas():
    lists = make(SMALL, copies=True)
    lists["emas"] = [laid_out(ema, "auto", 1) for ema in lists["emas"]]
    advance(lists, make_gradients(SMALL, 1))


def skip():
    for value in (1.0, -0.5, torch.nan):
        lists, grads = make(SMALL, copies=True), make_gradients(SMALL, 1)
        grads[2][3] = torch.inf
        before = deepcopy(lists)
        advance(lists, grads, skip=value)
        assert_equal(lists, before)


def alone():
    """A tensor's step does not depend on the others of the call, nor on their counts."""
    lists, grads = make(MANY, copies=True), make_gradients(MANY, 1, dtypes=(F32, BF16))
    for i, count in enumerate(lists["steps"]):
        count.fill_(i % 7)
    before = deepcopy(lists)
    advance(lists, grads)
    for i in (number for number, shape in enumerate(MANY) if shape != (0,)):
        own = {name: [tensors[i]] for name, tensors in before.items()}
        advance(own, [grads[i]])
        assert_equal(own, {name: [tensors[i]] for name, tensors in lists.items()})


def squares(shapes=SMALL, offset=0):
    grads = make_gradients(shapes, 1, dtypes=(BF16, F32), offset=offset)
    exact = sum((grad.double().square().sum() for grad in grads), torch.zeros(()).double())
    found = ops.sum_of_squares(grads, CPU)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)


def squares_of_many():
    squares(MANY)


# Their numbers.


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tensor_follows_the_formula(kind):
    options = {"weight_decay": 0.1, "ema_rate": 0.01, "grad_scale": 0.3}
    assert_follows_formula("auto", SIZES, 2, **KINDS[kind], **options)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_is_that_of_the_formula(options):
    step(**options)


@pytest.mark.usefixtures("on_cpu")
def test_tensors_with_a_copy_and_without_are_stepped_together():
    assert_some_have_copies("auto")


@pytest.mark.usefixtures("on_cpu")
def test_nothing_changes_under_skip():
    skip()


@pytest.mark.usefixtures("on_cpu")
def test_tensors_without_elements_and_those_of_several_launches():
    for shapes in (((0,),), MANY):
        step(shapes, dtypes=(F32, BF16))
    for shapes in ((), ((0,),), MANY[:320], MANY):
        squares(shapes)


@pytest.mark.usefixtures("on_cpu")
def test_a_tensor_is_stepped_as_if_it_were_alone():
    alone()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("offset", (0, 1, 2))
def test_sums_of_squares_are_those_of_fp64(offset):
    squares(SIZES, offset)


@pytest.mark.usefixtures("on_cpu", "heavy")
def test_a_sum_of_more_partials_than_its_block_has_threads():
    squares([(1 + i % 3,) for i in range(1030)])


@pytest.mark.usefixtures("on_cpu")
def test_the_optimizer_steps_as_with_torch():
    assert_implementations_agree("cpu", 3)


# Faults.

OVERRUN, ORDER, NUMBERS = "heap-buffer-overflow", "the result depends on the order", "at most"
FAULTS = (
    ("factors[t] =", "factors[t + FAULT] =", OVERRUN, step),
    ("i < end;", "i < end + FAULT;", OVERRUN, step, squares),
    ("(end - start) /", "(end - start + 3 * FAULT) /", OVERRUN, step, squares),
    ("i < count;", "i < count + FAULT;", OVERRUN, squares),
    ("of_warp[threadIdx.x / 32]", "of_warp[threadIdx.x / 32 + FAULT]", "out of bounds", squares),
    (
        "__syncthreads();",
        "if (!FAULT || threads != kThreads) __syncthreads();  // of squares_kernel",
        ORDER,
        squares,
    ),
    (
        "__syncthreads();",
        "if (!FAULT || threads != kSumThreads) __syncthreads();  // of sum_kernel",
        ORDER,
        squares,
    ),
    ("__syncthreads();", "if (!FAULT || threadIdx.x) __syncthreads();", "never come", squares),
    ("at(e.ema, 16)", "(FAULT || at(e.ema, 16))", "misaligned", step_with_unaligned_emas),
    ("  if (*o.skip != 0.0f)", "  if (!FAULT && *o.skip != 0.0f)", "not equal", skip),
    ("pow(beta2,", "pow(FAULT ? beta1 : beta2,", NUMBERS, step),
    ("first_block <= block)", "first_block <= block - FAULT)", NUMBERS, step),
    (
        "o.factors = factors + start",
        "o.factors = factors + (FAULT ? 0 : start)",
        "not equal",
        alone,
    ),
    ("partials + done", "partials + (FAULT ? 0 : done)", "not close", squares_of_many),
)
"""(text of the header, what takes its place, words of the failure, what fails...)."""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """The program with all the faults, of which `planted` chooses one."""
    header = HEADER.read_text()
    for number, (old, new, *_) in enumerate(FAULTS, start=1):
        assert header.count(old) == 1, f"the header has {header.count(old)} of {old!r}"
        header = header.replace(old, new.replace("FAULT", f"(planted == {number})"))
    return compiled(tmp_path_factory.mktemp("faulty"), header)


@pytest.mark.parametrize("check", dict.fromkeys(c for fault in FAULTS for c in fault[3:]))
def test_the_faulty_program_without_a_fault_is_right(install, faulty, check):
    install(faulty)
    check()


@pytest.mark.parametrize("number", range(1, len(FAULTS) + 1), ids=lambda n: FAULTS[n - 1][1])
def test_a_fault_is_caught(install, faulty, number):
    _, _, words, *checks = FAULTS[number - 1]
    install(faulty, number)
    for check in checks:
        with pytest.raises(AssertionError, match=words):
            check()
