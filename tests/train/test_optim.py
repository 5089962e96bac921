"""Steps of AdamWEMA against torch's AdamW, clipping and averages; on a GPU against its own."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._python_dispatch import TorchDispatchMode

from repa_fast import ops
from repa_fast.testing import assert_within_budget, seeded
from repa_fast.train import optim
from repa_fast.train.optim import AdamWEMA, clip_factor
from tests.refusals import refused
from tests.train import adamw
from tests.train.adamw import clipped_steps, copies, give_gradients, make_parameters, our_adamw
from tests.train.conftest import assert_same


@pytest.mark.parametrize("grouped", (False, True))
@pytest.mark.parametrize("decays", ((), (0.9,), (0.99, 0.5)), ids=str)
@pytest.mark.parametrize("weight_decay", (0.0, 0.125))
@pytest.mark.parametrize("max_norm", (1.0, math.inf))
def test_50_steps_equal_torchs_adamw_clipping_and_an_average(
    grouped, decays, weight_decay, max_norm
):
    kind = {"grouped": grouped, "decays": decays, "weight_decay": weight_decay}
    exact, working = (
        adamw.plain(d, 50, max_norm=max_norm, **kind) for d in (torch.float64, torch.float)
    )
    params = make_parameters()
    groups = adamw.make_groups(params, grouped)
    ours = our_adamw(params, decays, groups, weight_decay=weight_decay)
    norms = clipped_steps(ours, params, 50, max_norm)
    assert_within_budget("norms", norms, exact[2], working[2])
    assert 0 < (exact[2] > 1).sum() < 50
    assert_within_budget("parameters", *map(adamw.flat, (params, exact[0], working[0])))
    for average, *expected in zip(ours.averages, exact[1], working[1], strict=True):
        assert_within_budget("average", *map(adamw.flat, (average, *expected)))
    assert ours.state[params[adamw.SOMETIMES]]["step"].item() == 33
    assert ours.state[params[1]]["step"].item() == 50
    assert params[adamw.FROZEN] not in ours.state
    for frozen in (params[adamw.FROZEN], *(average[adamw.FROZEN] for average in ours.averages)):
        assert torch.equal(frozen, make_parameters()[adamw.FROZEN])


def test_without_any_gradient_the_norm_is_zero_and_averages_alone_move():
    """Exactly, where the sums are exact."""
    params = make_parameters()
    ours = our_adamw(params, (0.5,))
    values = [torch.arange(p.numel()).reshape(p.shape).float() for p in params]
    with torch.no_grad():
        for p, average, value in zip(params, ours.averages[0], values, strict=True):
            p.copy_(value)
            average.copy_(3 * value + 1)
    norm = ours.gradient_norm()
    assert norm.item() == 0 and norm.dtype == torch.float32 and norm.shape == ()
    ours.step()
    assert_same(params, values)
    assert_same(ours.averages[0], [2 * value + 0.5 for value in values])
    assert all(state["step"].item() == 0 for state in ours.state.values())


@pytest.mark.parametrize("poison", (0.0, math.inf, math.nan))
@pytest.mark.parametrize("scale", (1.0, math.nan, 0.0))
def test_a_skipped_step_changes_no_bit_and_what_is_not_finite_shows_in_the_norm(poison, scale):
    params = make_parameters()
    ours = our_adamw(params, (0.9, 0.5), weight_decay=0.1)
    clipped_steps(ours, params, 3)
    before = adamw.everything(params, ours)
    give_gradients(params, 3)
    params[1].grad[0, 0] += poison
    if poison:
        assert ours.gradient_norm().item() == pytest.approx(poison, nan_ok=True)
    ours.step(grad_scale=torch.tensor(scale), skip=torch.ones(()))
    assert_same(adamw.everything(params, ours), before)


def test_a_skipped_first_step_is_as_if_it_had_not_been():
    runs = []
    for skipped in (True, False):
        params = make_parameters()
        ours = our_adamw(params, (0.9,))
        if skipped:
            clipped_steps(ours, params, 1, first=7, skipped=(7,))
        clipped_steps(ours, params, 2)
        runs.append(adamw.everything(params, ours))
    assert_same(*runs)


def test_an_average_moves_by_one_operation_on_lists_of_its_shapes():
    """Lists of other shapes, 0-d weights say, take torch's slow route: a launch for each tensor."""
    params = make_parameters()
    ours = our_adamw(params, (0.9, 0.5))
    give_gradients(params, 0)
    found = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            lists = [argument for argument in args if isinstance(argument, list) and argument]
            if lists and any(t is average[1] for t in lists[0] for average in ours.averages):
                found.append([[t.shape for t in tensors] for tensors in lists])
            return function(*args, **(kwargs or {}))

    with Recording():
        ours.step()
    moving = [p.shape for i, p in enumerate(params) if i != adamw.FROZEN]
    assert found == [[moving, moving]] * 2


@pytest.mark.parametrize("value", (0.0, 1e-8, 0.5, 1.0, 1 + 1e-6, 3.0, 1e30))
def test_clip_factor_is_what_clip_grad_norm_multiplies_by(value):
    p = nn.Parameter(torch.zeros(1))
    p.grad = torch.tensor([value])
    nn.utils.clip_grad_norm_([p], 1.0)
    factor = clip_factor(torch.tensor(value), 1.0)
    assert (factor * value).item() == pytest.approx(p.grad.item(), rel=1e-6)


def test_set_lr_sets_every_group_and_the_tensor_stays_through_state_dicts():
    params = make_parameters()
    ours = our_adamw(params, groups=adamw.make_groups(params))
    tensors = [group["lr"] for group in ours.param_groups]
    assert [t.item() for t in tensors] == [adamw.LR, adamw.LR / 4]
    assert tensors[0] is not tensors[1] and tensors[0].dtype == torch.float32
    ours.set_lr(0.5)
    assert [g["lr"] for g in ours.param_groups] == [0.5, 0.5]
    state = ours.state_dict()
    assert all(g["lr"] is t for g, t in zip(ours.param_groups, tensors, strict=True))
    ours.load_state_dict(state)
    assert all(isinstance(group["lr"], torch.Tensor) for group in ours.param_groups)
    ours.set_lr(0.25)
    assert [group["lr"] for group in ours.state_dict()["param_groups"]] == [0.25, 0.25]


ON_DEVICES = [
    ("cpu", "torch"),
    pytest.param("cuda", "torch", marks=pytest.mark.gpu),
    pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("device, implementation", ON_DEVICES)
def test_averages_have_the_bits_of_a_fused_sgd_with_1_minus_decay(device, implementation):
    """As a tensor, in fp32. The kernel of csrc moves the first average."""
    decays = (0.9, 0.9999, 0.995, 0.3)
    params = make_parameters(device=device)
    ours = our_adamw(params, decays, implementation=implementation)
    zero = torch.zeros((), device=device)
    for step in range(3):
        before = [copies(average) for average in ours.averages]
        clipped_steps(ours, params, 1, first=step)
        for number, (average, decay) in enumerate(zip(before, decays, strict=True)):
            rate = torch.tensor(1 - decay, device=device)
            torch._fused_sgd_(
                average, copies(params), [], lr=rate, weight_decay=1.0, momentum=0.0,
                dampening=0.0, nesterov=False, maximize=True, is_first_step=False, found_inf=zero,
            )  # fmt: skip
            if number or implementation == "torch":
                assert_same(ours.averages[number], average)


def test_rates_of_averages_are_followed_and_written_only_where_they_change():
    params = make_parameters()
    ours = our_adamw(params, (0.9, 0.5))
    tensors = list(ours.ema_rates)
    assert [(t.item(), t.shape) for t in tensors] == [(torch.tensor(1 - 0.9).item(), ()), (0.5, ())]
    averages = [copies(params, torch.float64) for _ in range(2)]
    rates = ((1.0, 1.0), (0.75, 0.75), (0.25, 0.5), (0.25, 0.5))
    for step, pair in enumerate(rates):
        versions = [t._version for t in tensors]
        ours.set_ema_rates(pair)
        written = [t._version > version for t, version in zip(tensors, versions, strict=True)]
        assert written == [step != 3, step in (0, 1, 2)]
        clipped_steps(ours, params, 1, first=step)
        adamw.follow(averages, [1 - rate for rate in pair], params)
        for average, expected in zip(ours.averages, averages, strict=True):
            torch.testing.assert_close(adamw.flat(average).double(), adamw.flat(expected))
    assert all(a is b for a, b in zip(ours.ema_rates, tensors, strict=True))


@pytest.mark.parametrize("numbers", (2**26, 100), ids=("at once", "in groups"))
@pytest.mark.parametrize("held", (False, True))
def test_leaves_give_the_gradients_and_equal_their_parameters_after_every_step(
    monkeypatch, numbers, held
):
    """Which are stepped as by the same gradients in fp32, whether bf16 or summed elsewhere."""
    monkeypatch.setattr(optim, "CAST_NUMBERS", numbers)
    params, plain = make_parameters(), make_parameters()
    leaves = {p.detach(): nn.Parameter(p.detach().bfloat16()) for p in params[1:4]}
    masters = [*params[:1], *leaves, *params[4:]]
    ours = our_adamw(masters, (0.9,), leaves=leaves)
    theirs = our_adamw(plain, (0.9,))
    for step in range(4):
        skip = torch.tensor(float(step == 2))
        give_gradients(params, step)
        for own, p, other in zip(masters, params, plain, strict=True):
            other.grad = None if p.grad is None else p.grad.bfloat16().float()
            if own in leaves:
                leaves[own].grad = None if held else p.grad.bfloat16()
        pairs = [(m, p) for m, p in zip(masters, plain) if held and m in leaves]
        ours.held = {leaves[m]: p.grad.clone() for m, p in pairs}
        for p in (params[4], params[5]):
            p.grad = None if p.grad is None else p.grad.bfloat16().float()
        norms = [each.gradient_norm() for each in (ours, theirs)]
        assert norms[0].item() == pytest.approx(norms[1].item(), rel=1e-6)
        for each in (ours, theirs):
            each.step(grad_scale=clip_factor(norms[1], 1.0), skip=skip)
        assert_same(leaves.values(), [m.bfloat16() for m in leaves])
        assert_same(adamw.everything(masters, ours), adamw.everything(plain, theirs))
        ours.zero_grad()
        assert all(leaf.grad is None for leaf in leaves.values())
    masters[1].zero_()
    ours.write_leaves()
    assert not leaves[masters[1]].any()


def test_the_norm_of_bf16_gradients_is_summed_in_fp32():
    master = torch.zeros(300, 300)
    leaf = nn.Parameter(master.bfloat16())
    ours = AdamWEMA([master], leaves={master: leaf}, implementation="torch")
    leaf.grad = seeded((300, 300), seed=0, dtype=torch.bfloat16)
    exact = leaf.grad.double().norm().item()
    assert ours.gradient_norm().item() == pytest.approx(exact, rel=1e-6)


def test_the_norm_of_gradients_of_several_dtypes_is_that_of_all():
    params = [nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in (torch.float64, torch.float32)]
    ours = AdamWEMA(params, implementation="torch")
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    assert ours.gradient_norm().item() == pytest.approx(24**0.5)


def test_implementations_are_chosen_and_say_why(monkeypatch):
    params = make_parameters()
    auto = our_adamw(params, implementation="auto")
    assert (auto.implementation, auto.reason) == ("torch", "since the tensors are on cpu")
    assert our_adamw(params).reason == "asked for"
    monkeypatch.setattr(ops, "why_not_cuda", lambda device: "")
    assert our_adamw(params, implementation="auto").implementation == "cuda"
    half = make_parameters(torch.bfloat16)
    assert our_adamw(half, implementation="auto").implementation == "torch"
    refused(lambda: our_adamw(half, implementation="cuda"), "bfloat16")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda ps: AdamWEMA(ps, [copies(ps)]), "1 averages for 0 ema_decays"),
        (lambda ps: AdamWEMA(ps, [copies(ps)], (0.9, 0.5)), "1 averages for 2 ema_decays"),
        (lambda ps: AdamWEMA(ps, [copies(ps)[:5]], (0.9,)), "5 tensors that do not fit the 6 par"),
        (
            lambda ps: AdamWEMA(ps, [copies(ps), copies(ps)[::-1]], (0.9, 0)),
            "dtypes in the same order",
        ),
        (lambda ps: AdamWEMA(ps, [copies(ps, torch.bfloat16)], (0.9,)), "shapes and dtypes in the"),
        (lambda ps: our_adamw(ps, (-0.1,)), r"ema_decays are \(-0.1,\), expected .* in \[0, 1\)"),
        (lambda ps: our_adamw(ps, (1.0,)), r"ema_decays are \(1.0,\), expected values in \[0, 1\)"),
        (lambda ps: our_adamw(ps, implementation="cuda"), "'cuda', but the tensors are on cpu"),
        (lambda ps: our_adamw(ps, implementation="triton"), "'triton', expected one of auto, cuda"),
        (lambda ps: our_adamw(ps).step(lambda: 0.0), "closure"),
        (lambda ps: our_adamw(ps).add_param_group({"params": copies(ps)}), "fixed at construction"),
    ],
)
def test_what_does_not_fit_is_refused(make, words):
    refused(lambda: make(make_parameters()), words)


@pytest.mark.parametrize(
    "device, implementation",
    [("cpu", "torch"), pytest.param("cuda", "cuda", marks=pytest.mark.gpu)],
)
def test_distributed_state_round_trips(device, implementation):
    (params, ours), (twins, other) = (on(device, implementation) for _ in range(2))
    clipped_steps(ours, params, 3, skipped=(1,))
    give_gradients(params, 100)
    saved = copy.deepcopy(get_optimizer_state_dict(adamw.as_model(params), ours))
    assert set(saved["state"]) == {f"p{i}" for i in range(1, 6)}
    other.begin_states()
    set_optimizer_state_dict(adamw.as_model(twins), other, saved)
    with torch.no_grad():
        for mine, theirs in zip((twins, *other.averages), (params, *ours.averages), strict=True):
            torch._foreach_copy_(mine, theirs)
    assert_same(adamw.everything(twins, other), adamw.everything(params, ours))
    for p, o in ((params, ours), (twins, other)):
        clipped_steps(o, p, 3, first=3)
    assert_same(adamw.everything(twins, other), adamw.everything(params, ours))


def on(device, implementation, **more):
    params = make_parameters(device=device)
    options = {"weight_decay": 0.1, "implementation": implementation} | more
    return params, our_adamw(params, (0.9, 0.5), **options)


# On a GPU.


@pytest.mark.gpu
def test_cuda_equals_torch_over_steps_with_groups_clipping_and_skips():
    adamw.assert_implementations_agree("cuda", 20)


@pytest.mark.gpu
@pytest.mark.parametrize("options", ({"foreach": False}, {"fused": True}), ids=str)
def test_the_cuda_path_goes_on_from_torchs_state(options):
    expected = make_parameters(device="cuda")
    other = adamw.torch_adamw(expected, **options)
    for step in (0, 2):
        give_gradients(expected, step)
        other.step()
    params, ours = on("cuda", "cuda")
    for p, value in zip(params, expected, strict=True):
        p.data.copy_(value)
    ours.load_state_dict(copy.deepcopy(other.state_dict()))
    for each, optimizer in ((expected, other), (params, ours)):
        give_gradients(each, 3)
        optimizer.step()
    torch.testing.assert_close(adamw.flat(params), adamw.flat(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ("cuda", "torch"))
def test_a_step_does_not_wait_for_the_gpu(implementation):
    params, ours = on("cuda", implementation)
    clipped_steps(ours, params, 1)
    skip = torch.zeros((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.set_lr(0.25)
        ours.set_ema_rates((0.5, 0.25))
        ours.step(grad_scale=clip_factor(ours.gradient_norm(), 1.0), skip=skip)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ("cuda", "torch"))
def test_a_replayed_step_follows_the_rates_of_averages(implementation):
    runs = []
    for graphed in (False, True):
        params, ours = on("cuda", implementation)
        clipped_steps(ours, params, 1)
        step = ours.step
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                ours.step()
            step = graph.replay
        for rate in (1.0, 0.5, 0.25):
            ours.set_ema_rates((rate, rate / 2))
            step()
        runs.append(adamw.everything(params, ours))
    assert_same(*runs)
