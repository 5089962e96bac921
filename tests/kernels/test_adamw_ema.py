import math

import pytest
import torch

from repa_fast import ops
from repa_fast.backend import extension
from repa_fast.kernels.adamw_ema.cuda import adamw_ema_cuda
from repa_fast.testing import assert_within_budget, seeded

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
DEFAULTS = {
    "lr": 1e-2,
    "grad_scale": 1.0,
    "skip": 0.0,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
}
WRITTEN = ("params", "exp_avgs", "exp_avg_sqs", "emas", "param_copies", "ema_copies")
SHAPES = ((3, 5), (7,), (), (2, 0, 3), (1, 1))
LARGER = ((30, 50), (700,), (), (2, 0, 3), (1, 1))
# A block of the kernels takes 8192 elements, a launch 320 tensors.
ODD_SHAPES = ((8191,), (8192,), (8193,), (0,), (1,), (3, 5, 7), (), (40_001,))


def make(shapes, *, dtype=F32, device="cpu", averaged=True, copies=False, offset=0):
    """Lists for the op; parameters and averages random. `offset` elements precede each tensor."""

    def lay_out(values):
        whole = torch.zeros(values.numel() + offset, dtype=values.dtype, device=device)
        view = whole[offset:].view(values.shape)
        return view.copy_(values)

    params = [lay_out(seeded(s, seed=i).to(dtype)) for i, s in enumerate(shapes)]
    zeros = [torch.zeros_like(p) for p in params]
    lists = {
        "params": params,
        "exp_avgs": [lay_out(z) for z in zeros],
        "exp_avg_sqs": [lay_out(z) for z in zeros],
        "steps": [torch.zeros((), device=device) for _ in params],
        "emas": [lay_out(seeded(s, seed=500 + i).to(dtype)) for i, s in enumerate(shapes)],
    }
    if not averaged:
        del lists["emas"]
    if copies:
        lists["param_copies"] = [lay_out(z.bfloat16()) for z in zeros]
        if averaged:
            lists["ema_copies"] = [lay_out(z.bfloat16()) for z in zeros]
    return lists


def make_gradients(shapes, step, *, dtypes=(F32,), device="cpu", offset=0):
    """Random, in turn of the given dtypes, of scales from 1e-4 to 10."""
    gradients = []
    for i, shape in enumerate(shapes):
        values = seeded(shape, seed=1000 + 100 * step + i, std=10.0 ** (i % 6 - 4))
        dtype = dtypes[i % len(dtypes)]
        whole = torch.zeros(values.numel() + offset, dtype=dtype, device=device)
        gradients.append(whole[offset:].view(shape).copy_(values))
    return gradients


def advance(lists, grads, implementation="auto", **options):
    """One step of the op; lr, grad_scale and skip are numbers."""
    options = DEFAULTS | options
    device = lists["params"][0].device if lists["params"] else "cpu"
    scalars = {
        name: torch.tensor(options.pop(name), device=device)
        for name in ("lr", "grad_scale", "skip")
    }
    ops.adamw_ema(grads=grads, implementation=implementation, **lists, **scalars, **options)


def formula(lists, grads, step, *, ema_decay=0.0, **options):
    """Algorithm 2 of arXiv 1711.05101 and an average, tensor by tensor, in the tensors' dtype.

    The numbers that the op takes in fp32 are rounded to it, everything else is a Python float.
    """
    options = DEFAULTS | options
    lr, scale = (torch.tensor(options[name]).item() for name in ("lr", "grad_scale"))
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
            lists["emas"][i].copy_(ema_decay * lists["emas"][i] + (1 - ema_decay) * p)


def scalar_formula(p, grads, average, *, ema_decay=0.0, **options):
    """The same for one element over several steps, in Python floats: (p, m, v, average)."""
    options = DEFAULTS | options
    lr, scale = (torch.tensor(options[name]).item() for name in ("lr", "grad_scale"))
    (b1, b2), m, v = options["betas"], 0.0, 0.0
    for t, g in enumerate(grads, start=1):
        g *= scale
        p *= 1 - lr * options["weight_decay"]
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        p -= lr * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + options["eps"])
        average = ema_decay * average + (1 - ema_decay) * p
    return p, m, v, average


def doubled(lists):
    return {
        name: [t.double() for t in tensors] if name not in ("steps",) else [*tensors]
        for name, tensors in lists.items()
        if not name.endswith("copies")
    }


def cloned(lists):
    return {name: [t.clone() for t in tensors] for name, tensors in lists.items()}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensors in expected.items():
        for i, (a, b) in enumerate(zip(actual[name], tensors, strict=True)):
            assert a.dtype == b.dtype, f"{name}[{i}]"
            torch.testing.assert_close(
                a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name, j=i: f"{n}[{j}]: {m}"
            )


def assert_follows_formula(implementation, shapes, steps, *, device="cpu", averaged=True, **kind):
    """`steps` steps of the op in fp32 against the formula in fp64, within the error budget."""
    copies, dtypes, offset = (
        kind.pop(k, d) for k, d in (("copies", False), ("dtypes", (F32,)), ("offset", 0))
    )
    actual = make(shapes, device=device, averaged=averaged, copies=copies, offset=offset)
    working, exact = cloned(actual), doubled(actual)
    for step in range(1, steps + 1):
        grads = make_gradients(shapes, step, dtypes=dtypes, device=device, offset=offset)
        untouched = [g.clone() for g in grads]
        advance(actual, grads, implementation, **kind)
        assert all(torch.equal(a, b) for a, b in zip(grads, untouched, strict=True))
        formula(working, grads, step, **kind)
        formula(exact, grads, step, **kind)
    assert all(s.item() == steps for s in actual["steps"])
    for name in ("params", "exp_avgs", "exp_avg_sqs", *(("emas",) if averaged else ())):
        flat = [torch.cat([t.flatten() for t in lists[name]]) for lists in (actual, exact, working)]
        assert_within_budget(name, *flat)
        for i, tensors in enumerate(zip(actual[name], exact[name], working[name], strict=True)):
            if tensors[0].numel() > 1000:  # errors of a few elements say little
                assert_within_budget(f"{name}[{i}]", *tensors)
    if copies:
        for copy, of in (("param_copies", "params"), ("ema_copies", "emas")):
            for a, b in zip(actual.get(copy, []), actual.get(of, [])):
                assert torch.equal(a, b.bfloat16())


OPTIONS = (
    {},
    {"weight_decay": 0.1},
    {"betas": (0.5, 0.9), "eps": 1e-3},
    {"betas": (0.3, 0.95), "weight_decay": 0.5, "lr": 0.3},
    {"grad_scale": 0.125},
    {"ema_decay": 0.9},
    {"ema_decay": 0.9999, "weight_decay": 0.01, "grad_scale": 3.0, "lr": 1e-4},
)


@pytest.mark.parametrize("options", (*OPTIONS, {"betas": (0.0, 0.95)}), ids=str)
def test_reference_in_fp64_equals_the_formula_element_by_element(options):
    """lr and grad_scale are the numbers that their fp32 tensors hold; all else is fp64."""
    shapes, steps = ((2, 3), (1,)), 7
    lists = make(shapes, dtype=F64)
    start, grads = cloned(lists), []
    for step in range(1, steps + 1):
        grads.append(make_gradients(shapes, step, dtypes=(F64,)))
        advance(lists, grads[-1], "reference", **options)
    for i, shape in enumerate(shapes):
        for j in range(math.prod(shape)):
            expected = scalar_formula(
                start["params"][i].flatten()[j].item(),
                [g[i].flatten()[j].item() for g in grads],
                start["emas"][i].flatten()[j].item(),
                **options,
            )
            names = ("params", "exp_avgs", "exp_avg_sqs", "emas")
            actual = [lists[name][i].flatten()[j].item() for name in names]
            assert actual == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("averaged", (True, False))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_reference_in_fp32_is_within_the_budget(options, averaged):
    assert_follows_formula("reference", LARGER, 10, averaged=averaged, copies=True, **options)


def test_first_update_of_a_weight_at_zero_is_as_exact_as_fp32():
    """Where the weight does not hide it, the bias correction's own error shows."""
    lists = make(((64,),))
    lists["params"][0].zero_()
    working, exact = cloned(lists), doubled(lists)
    grads = make_gradients(((64,),), 1)
    advance(lists, grads, "reference")
    formula(working, grads, 1)
    formula(exact, grads, 1)
    assert_within_budget("params", *(x["params"][0] for x in (lists, exact, working)))


def test_the_budget_sees_a_beta_wrong_by_a_percent():
    wrong = make(((50,),))
    exact, working = doubled(wrong), cloned(wrong)
    for step in (1, 2):
        grads = make_gradients(((50,),), step)
        advance(wrong, grads, betas=(0.909, 0.999))
        formula(exact, grads, step)
        formula(working, grads, step)
    for name in ("params", "exp_avgs", "emas"):
        with pytest.raises(AssertionError, match="expected at most"):
            assert_within_budget(name, *(x[name][0] for x in (wrong, exact, working)))


def test_bf16_gradients_are_scaled_in_fp32():
    assert_follows_formula("reference", LARGER, 5, dtypes=(BF16, F32), grad_scale=1 / 3)


def test_ema_decay_zero_copies_and_the_average_is_of_the_new_weights():
    lists = make(SHAPES)
    advance(lists, make_gradients(SHAPES, 1), ema_decay=0.0)
    for average, param in zip(lists["emas"], lists["params"], strict=True):
        torch.testing.assert_close(average, param, rtol=1e-6, atol=1e-6)


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


def check_skip(device, implementation):
    for poison in (0.0, math.inf, -math.inf, math.nan):
        for scale in (1.0, math.nan, math.inf):
            lists = make(SHAPES, device=device, copies=True)
            advance(lists, make_gradients(SHAPES, 1, device=device), implementation)
            before = cloned(lists)
            grads = [g + poison for g in make_gradients(SHAPES, 2, device=device)]
            advance(
                lists, grads, implementation, skip=1.0, grad_scale=scale, weight_decay=0.1,
                ema_decay=0.5,
            )  # fmt: skip
            assert_equal(lists, before)


def test_skip_changes_nothing_whatever_the_gradients_are():
    check_skip("cpu", "reference")


def test_skip_is_anything_but_zero():
    for skip in (2.0, 0.5, -1.0, math.nan):
        lists = make(SHAPES)
        before = cloned(lists)
        advance(lists, make_gradients(SHAPES, 1), skip=skip)
        assert_equal(lists, before)


def test_a_step_after_a_skipped_one_is_the_first():
    a, b = make(SHAPES), make(SHAPES)
    advance(a, make_gradients(SHAPES, 5), skip=1.0)
    advance(a, make_gradients(SHAPES, 1))
    advance(b, make_gradients(SHAPES, 1))
    assert_equal(a, b)


def test_non_finite_gradients_without_skip_reach_their_own_element_only():
    lists = make(((4,), (3,)))
    grads = make_gradients(((4,), (3,)), 1)
    grads[0][2] = math.nan
    advance(lists, grads)
    assert lists["params"][0].isnan().tolist() == [False, False, True, False]
    assert lists["params"][1].isfinite().all()


def test_empty_lists_and_empty_tensors_are_accepted():
    advance(make(()), [])
    lists = make(((0,), (3, 0)), copies=True)
    advance(lists, make_gradients(((0,), (3, 0)), 1))
    assert [s.item() for s in lists["steps"]] == [1, 1]


def test_leaves_that_require_gradients_are_updated_in_place():
    lists = make(((3,),))
    leaf = lists["params"][0].requires_grad_()
    address = leaf.data_ptr()
    advance(lists, make_gradients(((3,),), 1))
    assert leaf.requires_grad and leaf.grad_fn is None and leaf.data_ptr() == address


def test_copies_of_the_weights_need_no_average():
    lists = make(SHAPES, averaged=False, copies=True)
    advance(lists, make_gradients(SHAPES, 1))
    for copy, param in zip(lists["param_copies"], lists["params"], strict=True):
        assert torch.equal(copy, param.bfloat16())


def test_copies_of_the_averages_without_averages_are_refused():
    lists = make(SHAPES, copies=True)
    del lists["emas"]
    with pytest.raises(ValueError, match=r"ema_copies"):
        advance(lists, make_gradients(SHAPES, 1))


@pytest.mark.parametrize(
    "name", ["grads", "exp_avgs", "exp_avg_sqs", "steps", "emas", "param_copies", "ema_copies"]
)
def test_lists_of_another_length_are_refused_by_name(name):
    lists = make(SHAPES, copies=True)
    lists["grads"] = make_gradients(SHAPES, 1)
    lists[name] = lists[name][:-1]
    before = cloned(lists)
    grads = lists.pop("grads")
    with pytest.raises(ValueError, match=rf"adamw_ema: {name} has 4 tensors, expected 5"):
        advance(lists, grads)
    del before["grads"]
    assert_equal(lists, before)


@pytest.mark.parametrize(
    "name", ["grads", "exp_avgs", "exp_avg_sqs", "emas", "param_copies", "ema_copies"]
)
def test_tensors_of_another_shape_are_refused_by_name(name):
    lists = make(SHAPES, copies=True)
    lists["grads"] = make_gradients(SHAPES, 1)
    lists[name][0] = lists[name][0].reshape(5, 3)
    grads = lists.pop("grads")
    with pytest.raises(ValueError, match=rf"{name} has shape \(5, 3\), expected \(3, 5\)"):
        advance(lists, grads)


def test_explicit_cuda_on_the_cpu_says_why():
    with pytest.raises(ValueError, match=r"implementation is 'cuda', but the tensors are on cpu"):
        advance(make(SHAPES), make_gradients(SHAPES, 1), "cuda")
    with pytest.raises(ValueError, match=r"implementation is 'cuda', but the tensors are on cpu"):
        ops.sum_of_squares([torch.ones(2)], torch.device("cpu"), implementation="cuda")


def test_unknown_implementation_is_refused():
    expected = r"implementation is 'triton', expected one of auto, cuda, reference"
    with pytest.raises(ValueError, match=expected):
        advance(make(SHAPES), make_gradients(SHAPES, 1), "triton")
    with pytest.raises(ValueError, match=expected):
        ops.sum_of_squares([torch.ones(2)], torch.device("cpu"), implementation="triton")


def test_why_not_cuda_names_the_device_then_the_library(monkeypatch, tmp_path):
    assert ops.why_not_cuda(torch.device("cpu")) == "the tensors are on cpu"
    library = tmp_path / extension.LIBRARY.name
    monkeypatch.setattr(extension, "LIBRARY", library)
    why_not = extension.why_not.__wrapped__  # the answer for the real library stays cached
    assert "is not built (python setup.py build_ext" in why_not()
    library.write_bytes(b"not a library")
    assert "does not load: " in why_not()


def squares_inputs(device="cpu"):
    shapes = [*ODD_SHAPES, *((17,),) * 330]
    tensors = make_gradients(shapes, 1, dtypes=(F32, BF16), device=device)
    return tensors + make_gradients(((1001,),), 2, device=device, offset=1)


def test_sum_of_squares_is_that_in_fp64():
    tensors = squares_inputs()
    exact = sum(t.double().square().sum() for t in tensors)
    found = ops.sum_of_squares(tensors, torch.device("cpu"))
    assert found.dtype == F64 and found.shape == ()
    assert found.item() == pytest.approx(exact.item(), rel=1e-6)
    assert torch.equal(found, ops.sum_of_squares(tensors, torch.device("cpu")))


def test_sum_of_squares_of_nothing_is_zero():
    for tensors in ([], [torch.ones(0)], [torch.ones(0, dtype=BF16), torch.ones(3, 0)]):
        found = ops.sum_of_squares(tensors, torch.device("cpu"))
        assert found.item() == 0 and found.dtype == F64 and found.shape == ()


@pytest.mark.parametrize("value", (math.inf, -math.inf, math.nan))
def test_sum_of_squares_of_non_finite_values_is_not_finite(value):
    tensors = [torch.ones(5), torch.tensor([1.0, value], dtype=BF16)]
    assert not ops.sum_of_squares(tensors, torch.device("cpu")).isfinite()


def unseen_writes(calls):
    """A stand-in for the operator: it changes what it writes, and autograd does not notice."""

    def operator(params, grads, exp_avgs, exp_avg_sqs, steps, emas, copies, ema_copies, *rest):
        for group in (params, exp_avgs, exp_avg_sqs, steps, emas, copies, ema_copies):
            for tensor in group:
                tensor.data.add_(1)
        calls.append(rest)

    return operator


def call_cuda(lists, grads):
    one = torch.ones(())
    adamw_ema_cuda(
        lists["params"], grads, lists["exp_avgs"], lists["exp_avg_sqs"], lists["steps"],
        lists["emas"], lists["param_copies"], lists["ema_copies"], lr=one, grad_scale=one,
        skip=0 * one, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, ema_decay=0.5,
    )  # fmt: skip


def test_a_stale_use_of_what_the_operator_wrote_raises(monkeypatch):
    calls = []
    operator = unseen_writes(calls)
    monkeypatch.setattr(torch.ops.repa_fast, "adamw_ema", operator, raising=False)
    for name in (*WRITTEN, "steps"):
        lists = make(((3,),), copies=True)
        used = lists[name][0].requires_grad_()
        silent, loss = used.square().sum(), used.square().sum()
        operator(*([used] if n == name else [] for n in (*WRITTEN[:1], "grads", *WRITTEN[1:])), [])
        silent.backward()
        call_cuda(lists, make_gradients(((3,),), 1))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    assert len(calls) == 2 * (len(WRITTEN) + 1)


def test_the_operator_gets_every_option_and_gradients_keep_their_version(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.ops.repa_fast, "adamw_ema", unseen_writes(calls), raising=False)
    lists, grads = make(SHAPES, copies=True), make_gradients(SHAPES, 1)
    versions = [g._version for g in grads]
    call_cuda(lists, grads)
    *scalars, factors, beta1, beta2, eps, weight_decay, ema_decay = calls[0]
    assert [s.item() for s in scalars] == [1, 1, 0]
    assert factors.dtype == F32 and factors.shape == (2 * len(SHAPES),)
    assert (beta1, beta2, eps, weight_decay, ema_decay) == (0.9, 0.99, 1e-8, 0.1, 0.5)
    assert [g._version for g in grads] == versions
    call_cuda(make((), copies=True), [])
    assert len(calls) == 1


# On a GPU.


@pytest.fixture
def cuda():
    """The first device, where the library is built."""
    device = torch.device("cuda", 0)
    if reason := ops.why_not_cuda(device):
        pytest.fail(reason)
    return device


KINDS = {
    "plain": {},
    "no average": {"averaged": False, "copies": True},
    "copies": {"copies": True},
    "bf16": {"dtypes": (BF16,)},
    "mixed": {"dtypes": (F32, BF16), "copies": True},
    "unaligned": {"offset": 1, "dtypes": (F32, BF16), "copies": True},
    "half aligned": {"offset": 2, "dtypes": (BF16, F32)},
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_follows_the_formula_over_100_steps(cuda, kind):
    options = {"weight_decay": 0.1, "ema_decay": 0.99, "grad_scale": 0.3}
    assert_follows_formula("cuda", ODD_SHAPES, 100, device=cuda, **KINDS[kind], **options)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_kernel_takes_every_option(cuda, options):
    assert_follows_formula("cuda", ODD_SHAPES, 10, device=cuda, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("count", (319, 320, 321, 700))
def test_kernel_takes_more_tensors_than_one_launch(cuda, count):
    shapes = [((i * 37) % 101,) for i in range(count - 1)] + [(20_000,)]
    assert_follows_formula("cuda", shapes, 3, device=cuda, dtypes=(F32, BF16), copies=True)


@pytest.mark.gpu
def test_kernel_takes_only_empty_tensors(cuda):
    lists = make(((0,),) * 3, device=cuda, copies=True)
    advance(lists, make_gradients(((0,),) * 3, 1, device=cuda), "cuda")
    assert [s.item() for s in lists["steps"]] == [1, 1, 1]


@pytest.mark.gpu
def test_kernel_is_as_close_as_the_reference_to_a_weight_at_zero(cuda):
    lists = make(((64,),), device=cuda)
    lists["params"][0].zero_()
    working, exact = cloned(lists), doubled(lists)
    grads = make_gradients(((64,),), 1, device=cuda)
    advance(lists, grads, "cuda")
    formula(working, grads, 1)
    formula(exact, grads, 1)
    assert_within_budget("params", *(x["params"][0] for x in (lists, exact, working)))


@pytest.mark.gpu
def test_kernel_gives_the_same_bits_every_time(cuda):
    def run():
        lists = make(ODD_SHAPES, device=cuda, copies=True)
        for step in range(1, 6):
            grads = make_gradients(ODD_SHAPES, step, dtypes=(F32, BF16), device=cuda)
            advance(lists, grads, "cuda", weight_decay=0.1, ema_decay=0.9)
        return lists

    assert_equal(run(), run())


@pytest.mark.gpu
def test_kernel_writes_nothing_beside_a_view(cuda):
    flat = torch.full((8192 + 5,), 7.0, device=cuda)
    lists = make(((8192 + 3,),), device=cuda)
    lists["params"] = [flat[1:-1]]
    advance(lists, make_gradients(((8192 + 3,),), 1, device=cuda), "cuda")
    assert flat[0] == 7 and flat[-1] == 7 and (flat[1:-1] != 7).all()


@pytest.mark.gpu
def test_kernel_skips(cuda):
    check_skip(cuda, "cuda")


@pytest.mark.gpu
def test_kernel_names_the_tensor_it_does_not_take(cuda):
    def lists():
        return make(((4, 6), (3,)), device=cuda, copies=True)

    grads = make_gradients(((4, 6), (3,)), 1, device=cuda)
    harms = {
        "exp_avgs": lambda t: t.cpu(),
        "exp_avg_sqs": lambda t: t.double(),
        "emas": lambda t: t.t().contiguous().t(),
        "param_copies": lambda t: t.half(),
        "ema_copies": lambda t: t.float(),
        "params": lambda t: t.bfloat16(),
        "steps": lambda t: torch.zeros((), dtype=torch.int64, device=cuda),
    }
    for name, harm in harms.items():
        broken = lists()
        broken[name][0] = harm(broken[name][0])
        with pytest.raises(RuntimeError, match=rf"adamw_ema: {name}\[0\]"):
            advance(broken, grads, "cuda")
    with pytest.raises(RuntimeError, match=r"adamw_ema: grads\[1\]"):
        advance(lists(), [grads[0], grads[1].half()], "cuda")
    with pytest.raises(RuntimeError, match=r"sum_of_squares: grads\[1\]"):
        ops.sum_of_squares([grads[0], grads[1].double()], cuda, implementation="cuda")


@pytest.mark.gpu
def test_kernel_refuses_another_shape_of_the_same_size(cuda):
    lists = make(((4, 6),), device=cuda)
    with pytest.raises((ValueError, RuntimeError), match="grads"):
        advance(lists, make_gradients(((6, 4),), 1, device=cuda), "cuda")


@pytest.mark.gpu
def test_kernel_sum_of_squares_is_that_in_fp64_and_the_same_every_time(cuda):
    tensors = squares_inputs(cuda)
    exact = sum(t.double().square().sum() for t in tensors)
    found = [ops.sum_of_squares(tensors, cuda, implementation="cuda") for _ in range(5)]
    assert found[0].item() == pytest.approx(exact.item(), rel=1e-6)
    assert all(torch.equal(f, found[0]) for f in found)
    empty = ops.sum_of_squares([torch.ones(0, device=cuda)], cuda, implementation="cuda")
    assert empty.item() == 0 and empty.dtype == F64 and empty.shape == ()


@pytest.mark.gpu
def test_kernels_are_captured_and_replayed(cuda):
    """Learning rate, scale, skip and gradients are read at replay, not at capture."""
    shapes = [*ODD_SHAPES, *((5,),) * 330]
    captured, eager = make(shapes, device=cuda), make(shapes, device=cuda)
    static = make_gradients(shapes, 0, device=cuda)
    scalars = {
        "lr": torch.zeros((), device=cuda),
        "grad_scale": torch.ones((), device=cuda),
        "skip": torch.zeros((), device=cuda),
    }
    options = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "ema_decay": 0.9}
    ops.sum_of_squares(static, cuda, implementation="cuda")
    advance(make(shapes, device=cuda), static, "cuda")  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        squares = ops.sum_of_squares(static, cuda, implementation="cuda")
        ops.adamw_ema(grads=static, **captured, **scalars, **options, implementation="cuda")
    for step in range(1, 5):
        grads = make_gradients(shapes, step, device=cuda)
        for a, b in zip(static, grads, strict=True):
            a.copy_(b)
        values = {"lr": 0.1 / step, "grad_scale": 0.5 * step, "skip": float(step == 3)}
        for name, value in values.items():
            scalars[name].fill_(value)
        graph.replay()
        advance(eager, grads, "cuda", **values, **options)
        assert torch.equal(squares, ops.sum_of_squares(grads, cuda, implementation="cuda"))
    assert_equal(captured, eager)


@pytest.mark.gpu
def test_kernels_run_on_the_current_stream(cuda):
    shapes = ((100_000,),)
    lists, expected = make(shapes, device=cuda), make(shapes, device=cuda)
    grads, values = ([torch.zeros(shapes[0], device=cuda)], make_gradients(shapes, 1, device=cuda))
    advance(expected, values, "cuda")
    squares = ops.sum_of_squares(values, cuda, implementation="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        grads[0].copy_(values[0])
        found = ops.sum_of_squares(grads, cuda, implementation="cuda")
        advance(lists, grads, "cuda")
    stream.synchronize()
    assert_equal(lists, expected)
    assert torch.equal(found, squares)


@pytest.mark.gpu
def test_kernels_run_on_the_tensors_device(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = torch.device("cuda", 1)
    there, here = make(ODD_SHAPES, device=other), make(ODD_SHAPES, device=cuda)
    advance(there, make_gradients(ODD_SHAPES, 1, device=other), "cuda")
    advance(here, make_gradients(ODD_SHAPES, 1, device=cuda), "cuda")
    assert torch.cuda.current_device() == 0
    assert_equal({n: [t.to(cuda) for t in ts] for n, ts in there.items()}, here)
    mixed = make(((3,), (3,)), device=cuda)
    mixed["params"][1] = mixed["params"][1].to(other)
    with pytest.raises(RuntimeError, match=r"params\[1\] is on device 1, expected 0"):
        advance(mixed, make_gradients(((3,), (3,)), 1, device=cuda), "cuda")


@pytest.mark.gpu
def test_a_stale_use_of_a_parameter_raises_after_the_kernel(cuda):
    lists = make(((3,),), device=cuda)
    leaf = lists["params"][0].requires_grad_()
    loss = leaf.square().sum()
    advance(lists, make_gradients(((3,),), 1, device=cuda), "cuda")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.gpu
@pytest.mark.usefixtures("heavy")
def test_kernel_takes_a_tensor_above_2_to_the_31_elements(cuda):
    count = 2**31 + 8195
    if torch.cuda.mem_get_info(cuda)[0] < count * 24:
        pytest.skip(f"needs {count * 24 / 2**30:.0f} GiB of free device memory")
    lists = {
        name: [torch.zeros(count, device=cuda)] for name in ("params", "exp_avgs", "exp_avg_sqs")
    }
    lists |= {"steps": [torch.zeros((), device=cuda)], "emas": [torch.zeros(count, device=cuda)]}
    grad = torch.zeros(count, dtype=BF16, device=cuda)
    places = [0, 8191, 2**31 - 1, 2**31, 2**31 + 8191, count - 1]
    grad[places] = torch.arange(1, 7, dtype=BF16, device=cuda)
    assert ops.sum_of_squares([grad], cuda, implementation="cuda").item() == 91
    advance(lists, [grad], "cuda", ema_decay=0.5)
    for name, expected in (("params", -0.01), ("emas", -0.005)):
        assert lists[name][0].count_nonzero().item() == len(places)
        assert lists[name][0][places].tolist() == pytest.approx([expected] * 6, rel=1e-5)
