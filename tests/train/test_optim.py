import copy
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._python_dispatch import TorchDispatchMode

from repa_fast import ops
from repa_fast.checkpoint.export import export
from repa_fast.testing import assert_within_budget, seeded
from repa_fast.train import checkpoint, optim
from repa_fast.train.optim import AdamWEMA, clip_factor, learning_rate
from repa_fast.train.resume import resume
from repa_fast.train.step import synthetic_batch, train_step
from repa_fast.train.torch_private import record_overflow
from tests.train.optim_ranks import MAX_NORM, steps

ROOT = Path(__file__).parents[2]
SHAPES = ((2, 3), (40, 50), (70,), (), (30, 1, 2), (60,))
FROZEN, SOMETIMES = 0, 5
"""Positions in SHAPES: never gets a gradient; gets none in every third step."""
LR = 2.0**-7


def make_parameters(dtype=torch.float32):
    params = [nn.Parameter(seeded(s, seed=i).to(dtype)) for i, s in enumerate(SHAPES)]
    params[FROZEN].requires_grad_(False)
    return params


def gets_gradient(i, step):
    return i != FROZEN and not (i == SOMETIMES and step % 3 == 1)


def give_gradients(params, step):
    """From 0.01 to 10 times the standard normal numbers, so that clipping comes and goes."""
    for i, p in enumerate(params):
        if gets_gradient(i, step):
            values = seeded(tuple(p.shape), seed=100 * step + i + 50, std=10.0 ** (step % 4 - 2))
            p.grad = values.to(p.device, p.dtype)
        else:
            p.grad = None


def make_groups(params, grouped):
    if not grouped:
        return params
    return [
        {"params": params[:3]},
        {"params": params[3:], "lr": LR / 4, "weight_decay": 0.25, "betas": (0.8, 0.9)},
    ]


def plain(dtype, count, *, grouped, max_norm, decays, weight_decay):
    """torch's pieces, written out: (parameters, averages, norms) after `count` steps."""
    params = make_parameters(dtype)
    averages = [[p.detach().clone() for p in params] for _ in decays]
    optimizer = torch.optim.AdamW(
        make_groups(params, grouped), lr=LR, weight_decay=weight_decay, foreach=False
    )
    norms = []
    for step in range(count):
        give_gradients(params, step)
        norms.append(nn.utils.clip_grad_norm_(params, max_norm))
        optimizer.step()
        for average, decay in zip(averages, decays, strict=True):
            for a, p in zip(average, params, strict=True):
                a.mul_(decay).add_(p.detach(), alpha=1 - decay)
    return params, averages, torch.stack(norms), optimizer


def make_optimizer(params, decays=(), **options):
    averages = [[p.detach().clone() for p in params] for _ in decays]
    groups = options.pop("groups", params)
    return AdamWEMA(groups, averages, decays, **{"lr": LR, "implementation": "torch"} | options)


def clipped_steps(optimizer, params, count, max_norm=1.0, first=0):
    norms = []
    for step in range(first, first + count):
        give_gradients(params, step)
        norms.append(optimizer.gradient_norm())
        optimizer.step(grad_scale=clip_factor(norms[-1], max_norm))
    return torch.stack(norms)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def everything(params, optimizer):
    tensors = [*params, *(t for average in optimizer.averages for t in average)]
    for p in params:
        tensors += optimizer.state[p].values() if p in optimizer.state else []
    return [t.detach().clone() for t in tensors]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("grouped", (False, True))
@pytest.mark.parametrize("decays", ((), (0.9,), (0.99, 0.5)), ids=str)
@pytest.mark.parametrize("weight_decay", (0.0, 0.125))
@pytest.mark.parametrize("max_norm", (1.0, math.inf))
def test_50_steps_equal_torchs_adamw_clipping_and_an_average(
    grouped, decays, weight_decay, max_norm
):
    kind = {"grouped": grouped, "decays": decays, "weight_decay": weight_decay}
    exact, working = (plain(d, 50, max_norm=max_norm, **kind) for d in (torch.float64, torch.float))
    params = make_parameters()
    groups = make_groups(params, grouped)
    ours = make_optimizer(params, decays, groups=groups, weight_decay=weight_decay)
    norms = clipped_steps(ours, params, 50, max_norm)
    assert_within_budget("norms", norms, exact[2], working[2])
    assert 0 < (exact[2] > 1).sum() < 50
    assert_within_budget("parameters", *map(flat, (params, exact[0], working[0])))
    for average, *expected in zip(ours.averages, exact[1], working[1], strict=True):
        assert_within_budget("average", *map(flat, (average, *expected)))
    assert ours.state[params[SOMETIMES]]["step"].item() == 33
    assert ours.state[params[1]]["step"].item() == 50
    assert params[FROZEN] not in ours.state


def test_frozen_parameters_and_their_average_keep_every_bit():
    params = make_parameters()
    ours = make_optimizer(params, (0.9,))
    before = params[FROZEN].clone()
    clipped_steps(ours, params, 5)
    assert torch.equal(params[FROZEN], before) and torch.equal(ours.averages[0][FROZEN], before)


def test_a_parameter_without_gradient_rests_and_its_average_moves():
    params = make_parameters()
    ours = make_optimizer(params, (0.5, 0.75))
    clipped_steps(ours, params, 1)
    weight, averages = params[SOMETIMES].clone(), [a[SOMETIMES].clone() for a in ours.averages]
    give_gradients(params, 1)
    assert params[SOMETIMES].grad is None
    ours.step()
    assert torch.equal(params[SOMETIMES], weight)
    assert ours.state[params[SOMETIMES]]["step"].item() == 1
    for average, before, decay in zip(ours.averages, averages, (0.5, 0.75), strict=True):
        expected = decay * before + (1 - decay) * weight
        torch.testing.assert_close(average[SOMETIMES], expected, rtol=1e-6, atol=1e-7)


def test_without_any_gradient_the_norm_is_zero_and_only_averages_move():
    params = make_parameters()
    ours = make_optimizer(params, (0.5,))
    for average in ours.averages[0]:
        average.zero_()
    before = [p.detach().clone() for p in params]
    norm = ours.gradient_norm()
    assert norm.item() == 0 and norm.dtype == torch.float32 and norm.shape == ()
    ours.step()
    assert_same(params, before)
    assert all(state["step"].item() == 0 for state in ours.state.values())
    assert_same(ours.averages[0], [p / 2 for p in before])


@pytest.mark.parametrize("poison", (0.0, math.inf, math.nan))
@pytest.mark.parametrize("scale", (1.0, math.nan, 0.0))
def test_a_skipped_step_changes_no_bit(poison, scale):
    params = make_parameters()
    ours = make_optimizer(params, (0.9, 0.5), weight_decay=0.1)
    clipped_steps(ours, params, 3)
    before = everything(params, ours)
    give_gradients(params, 3)
    params[1].grad[0] += poison
    ours.step(grad_scale=torch.tensor(scale), skip=torch.ones(()))
    assert_same(everything(params, ours), before)


def test_a_skipped_first_step_is_as_if_it_had_not_been():
    runs = []
    for skipped in (True, False):
        params = make_parameters()
        ours = make_optimizer(params, (0.9,))
        if skipped:
            give_gradients(params, 7)
            ours.step(skip=torch.ones(()))
        clipped_steps(ours, params, 2)
        runs.append(everything(params, ours))
    assert_same(*runs)


def test_an_average_moves_by_one_operation_on_lists_of_its_shapes():
    """Lists of other shapes, 0-d weights say, take torch's slow route: a launch for each tensor."""
    params = make_parameters()
    ours = make_optimizer(params, (0.9, 0.5))
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
    moving = [p.shape for i, p in enumerate(params) if i != FROZEN]
    assert found == [[moving, moving]] * 2


def test_averages_follow_the_weights_exactly_where_the_sums_are_exact():
    params = make_parameters()
    ours = make_optimizer(params, (0.5,))
    values = [torch.arange(p.numel()).reshape(p.shape).float() for p in params]
    with torch.no_grad():
        for p, average, value in zip(params, ours.averages[0], values, strict=True):
            p.copy_(value)
            average.copy_(3 * value + 1)
    ours.step()  # no gradients: the weights rest
    assert_same(ours.averages[0], [2 * value + 0.5 for value in values])
    assert_same(params, values)


def test_gradient_norm_is_clip_grad_norms():
    params = make_parameters()
    ours = make_optimizer(params)
    for step in range(4):
        give_gradients(params, step)
        expected = nn.utils.clip_grad_norm_(params, math.inf)
        assert ours.gradient_norm().item() == pytest.approx(expected.item(), rel=1e-6)
    params[1].grad[0, 0] = math.nan
    assert ours.gradient_norm().isnan()
    params[1].grad[0, 0] = math.inf
    assert ours.gradient_norm().isinf()


def test_clip_factor_is_what_clip_grad_norm_multiplies_by():
    for value in (0.0, 1e-8, 0.5, 1.0, 1 + 1e-6, 3.0, 1e30):
        p = nn.Parameter(torch.zeros(1))
        p.grad = torch.tensor([value])
        nn.utils.clip_grad_norm_([p], 1.0)
        factor = clip_factor(torch.tensor(value), 1.0)
        assert (factor * value).item() == pytest.approx(p.grad.item(), rel=1e-6)


def test_closures_are_refused():
    with pytest.raises(ValueError, match="closure"):
        make_optimizer(make_parameters()).step(lambda: 0.0)


def test_implementations_are_chosen_and_say_why():
    params = make_parameters()
    with pytest.raises(ValueError, match=r"'cuda', but the tensors are on cpu"):
        make_optimizer(params, implementation="cuda")
    with pytest.raises(ValueError, match=r"'triton', expected one of auto, cuda, torch"):
        make_optimizer(params, implementation="triton")
    auto = make_optimizer(params, implementation="auto")
    assert (auto.implementation, auto.reason) == ("torch", "since the tensors are on cpu")
    assert make_optimizer(params).reason == "asked for"


def test_auto_takes_cuda_only_for_what_cuda_takes(monkeypatch):
    monkeypatch.setattr(ops, "why_not_cuda", lambda device: "")
    params = make_parameters()
    assert make_optimizer(params, implementation="auto").implementation == "cuda"
    half = make_parameters(torch.bfloat16)
    assert make_optimizer(half, implementation="auto").implementation == "torch"
    with pytest.raises(ValueError, match=r"bfloat16"):
        make_optimizer(half, implementation="cuda")


def test_averages_that_do_not_fit_are_refused():
    params = make_parameters()
    good = [p.detach().clone() for p in params]
    for averages, decays, expected in (
        ([good], (), "1 averages for 0 ema_decays"),
        ([good], (0.9, 0.5), "1 averages for 2 ema_decays"),
        ([good[:-1]], (0.9,), "5 tensors that do not fit the 6 parameters"),
        ([good, [*reversed(good)]], (0.9, 0.5), "the same shapes in the same order"),
    ):
        with pytest.raises(ValueError, match=expected):
            AdamWEMA(params, averages, decays)


def test_averages_of_another_dtype_are_refused_when_made_not_when_stepped():
    params = make_parameters()
    with pytest.raises(ValueError, match="bfloat16"):
        AdamWEMA(params, [[p.detach().bfloat16() for p in params]], (0.9,))


def test_set_lr_sets_every_group_and_keeps_the_tensor():
    params = make_parameters()
    ours = make_optimizer(params, groups=make_groups(params, True))
    tensors = [group["lr"] for group in ours.param_groups]
    assert [t.item() for t in tensors] == [LR, LR / 4]
    ours.set_lr(0.5)
    assert [g["lr"] for g in ours.param_groups] == [0.5, 0.5]
    assert all(g["lr"] is t for g, t in zip(ours.param_groups, tensors, strict=True))
    assert tensors[0] is not tensors[1] and tensors[0].dtype == torch.float32


def test_a_group_added_later_is_refused_or_takes_part():
    params = make_parameters()
    ours = make_optimizer(params)
    late = nn.Parameter(torch.ones(3))
    late.grad = torch.full((3,), 2.0)
    try:
        ours.add_param_group({"params": [late]})
    except ValueError:
        return
    assert ours.gradient_norm().item() == pytest.approx(math.sqrt(12))
    ours.set_lr(0.1)
    ours.step()
    assert (late < 1).all()


def test_copies_equal_their_parameters_after_every_step_and_on_demand():
    params = make_parameters()
    copies = {p: p.detach().bfloat16() for p in params[1:4]}
    ours = make_optimizer(params, (0.9,), copies=copies)
    for step in range(4):
        give_gradients(params, step)
        ours.step(skip=torch.tensor(float(step == 2)))
        assert_same(copies.values(), [p.bfloat16() for p in copies])
    with torch.no_grad():
        params[1].zero_()
    ours.write_copies()
    assert not copies[params[1]].any()


# Learning rate.


def rates(config, **options):
    config = config(learning_rate=0.5, max_train_steps=20, **options)
    return [learning_rate(config, step) for step in range(25)]


def test_constant_learning_rate_is_constant(config):
    assert set(rates(config)) == {0.5}


def test_warm_up_is_linear_and_ends_at_the_learning_rate(config):
    found = rates(config, warmup_steps=5)
    assert found[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert set(found[5:]) == {0.5}


@pytest.mark.parametrize("warmup", (0, 1, 5, 19, 20))
def test_cosine_falls_from_the_learning_rate_to_its_end(config, warmup):
    found = rates(config, lr_schedule="cosine", min_learning_rate=0.125, warmup_steps=warmup)
    after = found[warmup:]
    assert after[0] == 0.5 and after[-1] == 0.125
    assert all(a >= b for a, b in zip(after, after[1:]))
    assert all(r == 0.125 for r in found[max(20, warmup + 1) :])
    if warmup == 0:
        assert found[10] == pytest.approx((0.5 + 0.125) / 2)
        assert found[5] == pytest.approx(0.125 + 0.375 * (1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize(
    "options", ({"warmup_steps": -1}, {"min_learning_rate": -0.1}, {"min_learning_rate": 0.6})
)
def test_schedules_that_make_no_sense_are_refused(config, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        config(learning_rate=0.5, lr_schedule="cosine", **options)


def test_train_step_follows_the_schedule(make_state):
    state = make_state(lr_schedule="cosine", warmup_steps=2, max_train_steps=5)
    batch, _ = synthetic_batch(state, 12)
    for step in range(6):
        train_step(state, batch)
        expected = learning_rate(state.config, step)
        assert state.optimizer.param_groups[0]["lr"].item() == pytest.approx(expected, rel=1e-6)


# State.


def theirs(params, **options):
    return torch.optim.AdamW(params, **{"lr": LR, "weight_decay": 0.1} | options)


@pytest.mark.parametrize("options", ({"foreach": False}, {"fused": True}, {}), ids=str)
def test_our_state_continues_in_torchs_adamw_and_the_other_way_round(options, tmp_path):
    """Three steps of one, three of the other, through a file, equal six of torch's."""
    expected_params = make_parameters()
    expected = theirs(expected_params, **options)
    for step in range(6):
        give_gradients(expected_params, step)
        expected.step()
    for ours_first in (True, False):
        params = make_parameters()
        ours, other = make_optimizer(params, weight_decay=0.1), theirs(params, **options)
        first, second = (ours, other) if ours_first else (other, ours)
        for step in range(3):
            give_gradients(params, step)
            first.step()
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for step in range(3, 6):
            give_gradients(params, step)
            second.step()
        torch.testing.assert_close(flat(params), flat(expected_params), rtol=1e-6, atol=1e-6)
        assert second.state[params[1]]["step"].item() == 6


def test_state_dict_is_torchs_own():
    params = make_parameters()
    ours, other = make_optimizer(params), theirs(params, fused=True, weight_decay=0.0)
    give_gradients(params, 0)
    ours.step()
    other.step()
    a, b = ours.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert a["state"].keys() == b["state"].keys()
    for index, values in b["state"].items():
        assert a["state"][index].keys() == values.keys()
        for key, value in values.items():
            assert a["state"][index][key].dtype == value.dtype
            assert a["state"][index][key].shape == value.shape
    assert a["param_groups"] == b["param_groups"]
    assert type(a["param_groups"][0]["lr"]) is float


def test_taking_the_state_leaves_the_learning_rate_on_the_device():
    ours = make_optimizer(make_parameters())
    ours.state_dict()
    assert isinstance(ours.param_groups[0]["lr"], torch.Tensor)
    ours.load_state_dict(ours.state_dict())
    assert isinstance(ours.param_groups[0]["lr"], torch.Tensor)
    ours.set_lr(0.25)
    assert ours.state_dict()["param_groups"][0]["lr"] == 0.25


@pytest.mark.parametrize("how", (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))))
def test_a_copy_steps_like_the_original_or_is_refused(how):
    params = make_parameters()
    ours = make_optimizer(params, (0.5,))
    clipped_steps(ours, params, 2)
    try:
        twin = how(ours)
    except (NotImplementedError, TypeError, ValueError):
        return
    copies = [p for group in twin.param_groups for p in group["params"]]
    clipped_steps(ours, params, 2, first=2)
    clipped_steps(twin, copies, 2, first=2)
    assert_same(everything(copies, twin), everything(params, ours))


def as_model(params):
    model = nn.Module()
    for i, p in enumerate(params):
        model.register_parameter(f"p{i}", p)
    return model


def test_distributed_state_round_trips():
    params = make_parameters()
    ours = make_optimizer(params, (0.9,), weight_decay=0.1)
    clipped_steps(ours, params, 3)
    give_gradients(params, 100)
    saved = copy.deepcopy(get_optimizer_state_dict(as_model(params), ours))
    assert set(saved["state"]) == {f"p{i}" for i in range(1, 6)}
    other_params = make_parameters()
    with torch.no_grad():
        for p, q in zip(other_params, params, strict=True):
            p.copy_(q)
    other = make_optimizer(other_params, (0.9,), weight_decay=0.1)
    other.begin_states()
    set_optimizer_state_dict(as_model(other_params), other, saved)
    for average, expected in zip(other.averages[0], ours.averages[0], strict=True):
        average.copy_(expected)
    assert_same(everything(other_params, other), everything(params, ours))
    for p, o in ((params, ours), (other_params, other)):
        clipped_steps(o, p, 3, first=3)
    assert_same(everything(other_params, other), everything(params, ours))


def test_reading_the_state_of_a_begun_optimizer_moves_neither_weights_nor_averages():
    """Of one that is not, torch's get_optimizer_state_dict makes it by a step of its own."""
    params = make_parameters()
    ours = make_optimizer(params, (0.5, 0.9), weight_decay=0.1)
    for average in ours.averages:
        for tensor in average:
            tensor.zero_()
    weights = [p.detach().clone() for p in params]
    ours.begin_states()
    get_optimizer_state_dict(as_model(params), ours)
    assert_same(params, weights)
    assert len(ours.state) == 5 and params[FROZEN] not in ours.state
    assert all(not value.any() for state in ours.state.values() for value in state.values())
    assert all(not t.any() for average in ours.averages for t in average)


@pytest.fixture
def fake_cuda(monkeypatch):
    """Parameters on a CUDA device that exists in name only."""
    monkeypatch.setattr(optim, "_lr_to_host", lambda optimizer, state: None)  # no value to read
    monkeypatch.setattr(ops, "why_not_cuda", lambda device: "")
    with FakeTensorMode():
        yield [nn.Parameter(torch.zeros(3, device="cuda")) for _ in range(2)]


@pytest.mark.parametrize("options", ({"foreach": False}, {"fused": True}, {}), ids=str)
def test_state_of_torchs_adamw_comes_to_the_parameters_device(fake_cuda, options):
    other = theirs([nn.Parameter(torch.zeros(3, device="cuda")) for _ in range(2)], **options)
    for p in other.param_groups[0]["params"]:
        other.state[p] = {
            "step": torch.ones(()),
            "exp_avg": torch.zeros(3),
            "exp_avg_sq": torch.zeros(3),
        }
    ours = AdamWEMA(fake_cuda)
    ours.load_state_dict(other.state_dict())
    for p in fake_cuda:
        assert {key: value.device.type for key, value in ours.state[p].items()} == {
            "step": "cuda",
            "exp_avg": "cuda",
            "exp_avg_sq": "cuda",
        }
    assert ours.param_groups[0]["lr"].device.type == "cuda"


def test_every_scalar_of_a_step_is_on_the_parameters_device(fake_cuda, monkeypatch):
    devices = []

    def op(params, *lists, lr, grad_scale, skip, **options):
        devices.append({t.device.type for t in (*params, lr, grad_scale, skip)})

    monkeypatch.setattr(ops, "adamw_ema", op)
    ours = AdamWEMA(fake_cuda)
    assert ours.implementation == "cuda"
    ours.begin_states()
    get_optimizer_state_dict(as_model(fake_cuda), ours)
    assert not devices
    for p in fake_cuda:
        p.grad = torch.zeros_like(p)
    ours.step()
    assert [found for found in devices if found] and all(found == {"cuda"} for found in devices)


def test_the_cuda_path_hands_its_lists_to_the_op(monkeypatch):
    """The first average in the op, the others and those of resting parameters outside."""
    monkeypatch.setattr(ops, "why_not_cuda", lambda device: "")
    real, calls = ops.adamw_ema, []

    def op(*lists, **options):
        if lists[0]:
            calls.append(options)
        real(*lists, **options | {"implementation": "reference"})

    monkeypatch.setattr(ops, "adamw_ema", op)
    runs = []
    for implementation in ("cuda", "torch"):
        params = make_parameters()
        groups = make_groups(params, True)
        o = make_optimizer(
            params, (0.9, 0.5), groups=groups, weight_decay=0.1, implementation=implementation
        )
        for step in range(6):
            give_gradients(params, step)
            o.step(grad_scale=torch.tensor(0.5), skip=torch.tensor(float(step == 2)))
        runs.append(everything(params, o))
    assert len(calls) == 12
    assert all(c["implementation"] == "cuda" and c["ema_decay"] == 0.9 for c in calls)
    assert [len(c["emas"]) for c in calls[:4]] == [2, 3, 2, 2]
    torch.testing.assert_close(*map(flat, runs), rtol=1e-5, atol=1e-6)


# Loss scaling.


def test_overflow_halves_the_scale_and_good_steps_grow_it_as_torchs_own_do():
    ours_params, their_params = make_parameters(), make_parameters()
    ours, other = make_optimizer(ours_params, weight_decay=0.1), theirs(their_params)
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3) for _ in range(2)]
    overflows, seen = {2, 3, 9, 14}, []
    for step in range(18):
        for params, scaler in zip((ours_params, their_params), scalers, strict=True):
            scale = scaler.scale(torch.ones(()))
            give_gradients(params, step)
            for p in params:
                if p.grad is not None:
                    p.grad.mul_(scale)
            if step in overflows:
                params[2].grad[5] = math.inf if step % 2 else math.nan
        norm = ours.gradient_norm()
        bad = 1 - torch.isfinite(norm).float()
        ours.step(grad_scale=scalers[0]._get_scale_async().reciprocal(), skip=bad)
        record_overflow(scalers[0], ours, bad)
        scalers[1].unscale_(other)
        scalers[1].step(other)
        for scaler in scalers:
            scaler.update()
        a, b = (scaler.state_dict() for scaler in scalers)
        assert a == b
        seen.append(a["scale"])
        torch.testing.assert_close(flat(ours_params), flat(their_params), rtol=1e-6, atol=1e-6)
    assert min(seen) == 2.0 and max(seen) >= 8.0 and len(set(seen)) >= 3
    assert ours.state[ours_params[1]]["step"].item() == 14


def test_gradient_scalers_own_step_is_honoured_or_refused():
    """torch's fused AdamW, whose subclass this is, takes scale and overflow from the scaler."""
    params = make_parameters()
    ours = make_optimizer(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    give_gradients(params, 0)
    params[1].grad[0, 0] = math.inf
    before = [p.detach().clone() for p in params]
    try:
        scaler.step(ours)
    except (ValueError, RuntimeError):
        return
    assert_same(params, before)


# The training step.


def emas(state):
    return [state.ema, *state.more_emas]


def test_30_train_steps_equal_plain_torch_on_the_recorded_gradients(make_state, monkeypatch):
    state = make_state(
        optimizer_impl="torch", adam_weight_decay=0.1, ema_decay="0.9,0.5", max_grad_norm=0.05,
        lr_schedule="cosine", warmup_steps=5, max_train_steps=30, learning_rate=4e-3,
    )  # fmt: skip
    params = [nn.Parameter(p.detach().clone()) for p in state.model.parameters()]
    averages = [[p.detach().clone() for p in ema.parameters()] for ema in emas(state)]
    recorded, measure = [], state.optimizer.gradient_norm

    def recording():
        grads = [p.grad for p in state.model.parameters()]
        recorded.append([None if g is None else g.clone() for g in grads])
        return measure()

    monkeypatch.setattr(state.optimizer, "gradient_norm", recording)
    for step in range(30):
        batch, _ = synthetic_batch(state, 12)
        if step == 11:
            batch["moments"].fill_(math.nan)
        train_step(state, batch)
    optimizer = torch.optim.AdamW(params, weight_decay=0.1, foreach=False)
    for step, grads in enumerate(recorded):
        if step == 11:
            continue
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        nn.utils.clip_grad_norm_(params, 0.05)
        optimizer.param_groups[0]["lr"] = learning_rate(state.config, step)
        optimizer.step()
        for average, decay in zip(averages, (0.9, 0.5), strict=True):
            for a, p in zip(average, params, strict=True):
                a.mul_(decay).add_(p.detach(), alpha=1 - decay)
    pairs = [(state.model.parameters(), params)]
    pairs += [(ema.parameters(), average) for ema, average in zip(emas(state), averages)]
    for ours, expected in pairs:
        assert (flat(ours) - flat(expected)).norm() <= 1e-6 * flat(expected).norm()
        torch.testing.assert_close(flat(state.model.parameters()), flat(params), rtol=0, atol=1e-6)
    assert (flat(params) - flat(averages[0])).norm() > 1e-3


def test_several_averages_follow_the_weights_at_their_own_pace(make_state):
    state = make_state(ema_decay="0.9,0.5")
    assert len(state.more_emas) == 1 and state.optimizer.ema_decays == (0.9, 0.5)
    batch, _ = synthetic_batch(state, 12)
    expected = [flat(ema.parameters()).double() for ema in emas(state)]
    for _ in range(4):
        train_step(state, batch)
        weights = flat(state.model.parameters()).double()
        expected = [d * e + (1 - d) * weights for d, e in zip((0.9, 0.5), expected)]
    for ema, values in zip(emas(state), expected, strict=True):
        torch.testing.assert_close(flat(ema.parameters()).double(), values, rtol=1e-6, atol=1e-6)
        assert not ema.training and not any(p.requires_grad for p in ema.parameters())


def test_a_skipped_train_step_moves_no_average(make_state):
    state = make_state(ema_decay="0.9,0.5,0")
    batch, _ = synthetic_batch(state, 12)
    train_step(state, batch)
    before = [flat(ema.parameters()) for ema in emas(state)]
    batch["moments"].fill_(math.inf)
    train_step(state, batch)
    assert_same([flat(ema.parameters()) for ema in emas(state)], before)


def test_checkpoints_hold_every_average_and_training_goes_on_bit_for_bit(make_state, tmp_path):
    state = make_state(ema_decay="0.9,0.5")
    batch, _ = synthetic_batch(state, 12)
    for _ in range(2):
        train_step(state, batch)
    checkpoint.save(tmp_path, state)
    other = make_state(ema_decay="0.9,0.5", resume="auto", seed=5)
    other.config.seed = state.config.seed
    resume(tmp_path, other)
    for _ in range(2):
        for each in (state, other):
            train_step(each, batch)
    for mine, theirs in zip((state.model, *emas(state)), (other.model, *emas(other)), strict=True):
        assert_same(theirs.parameters(), mine.parameters())
    a, b = ([*s.optimizer.state_dict()["state"].values()] for s in (state, other))
    for x, y in zip(a, b, strict=True):
        assert_same(x.values(), y.values())


@pytest.mark.parametrize("decays, saved", (("0.9", "0.9,0.5"), ("0.9,0.5,0.1", "0.9")))
def test_another_number_of_averages_is_refused_by_its_flag(make_state, tmp_path, decays, saved):
    checkpoint.save(tmp_path, make_state(ema_decay=saved))
    expected = rf"holds {saved.count(',') + 1} averages.*expected .*--ema-decay {decays}"
    other = make_state(ema_decay=decays, resume="0")
    other.config.resume = "auto"
    with pytest.raises(ValueError, match=expected):
        resume(tmp_path, other)


def test_saving_before_the_first_step_changes_no_later_step(make_state, tmp_path):
    saved, unsaved = make_state(), make_state()
    checkpoint.save(tmp_path, saved)
    batch, _ = synthetic_batch(saved, 12)
    for state in (saved, unsaved):
        train_step(state, batch)
    assert_same(saved.model.parameters(), unsaved.model.parameters())
    assert_same(saved.ema.parameters(), unsaved.ema.parameters())


def test_an_official_file_fills_every_average(make_state, tmp_path):
    state = make_state(ema_decay="0.9")
    batch, _ = synthetic_batch(state, 12)
    for _ in range(2):
        train_step(state, batch)
    checkpoint.save(tmp_path, state)
    export(checkpoint.path_of(tmp_path, 2), "official", tmp_path / "0000002.pt")
    other = make_state(ema_decay="0.9,0.5,0.25", resume=str(tmp_path / "0000002.pt"))
    resume(tmp_path / "none", other)
    assert other.step == 2
    for ema in emas(other):
        assert_same(ema.parameters(), state.ema.parameters())
    train_step(other, batch)
    assert len({flat(ema.parameters()).sum().item() for ema in emas(other)}) == 3


# On a GPU.


def on_gpu(decays=(0.9, 0.5), **options):
    params = [nn.Parameter(p.detach().cuda(), p.requires_grad) for p in make_parameters()]
    return params, make_optimizer(params, decays, weight_decay=0.1, **options)


def steps_on_gpu(optimizer, params, count, first=0):
    """Clipped; the second is skipped."""
    for step in range(first, first + count):
        give_gradients(params, step)
        factor = clip_factor(optimizer.gradient_norm(), 1.0)
        optimizer.step(grad_scale=factor, skip=torch.full((), float(step == 1), device="cuda"))


@pytest.mark.gpu
def test_cuda_equals_torch_over_steps_with_groups_clipping_and_skips():
    runs = []
    for implementation in ("cuda", "torch"):
        params, ours = on_gpu(implementation=implementation)
        steps_on_gpu(ours, params, 20)
        runs.append(everything(params, ours))
    torchs = 2**-24 * 0.999 / 0.001  # torch takes 1 - beta2 in fp32, of a rounded beta2
    for a, b in zip(*runs, strict=True):
        assert (a - b).norm() <= (torchs + 1e-6) * b.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("options", ({"foreach": False}, {"fused": True}), ids=str)
def test_the_cuda_path_goes_on_from_torchs_state(options):
    expected, _ = on_gpu()
    other = theirs(expected, **options)
    for step in (0, 2, 3):
        give_gradients(expected, step)
        other.step()
        if step == 2:
            saved = copy.deepcopy(other.state_dict())
            middle = [p.detach().clone() for p in expected]
    params, ours = on_gpu(implementation="cuda")
    for p, value in zip(params, middle, strict=True):
        p.data.copy_(value)
    ours.load_state_dict(saved)
    give_gradients(params, 3)
    ours.step()
    torch.testing.assert_close(flat(params), flat(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_distributed_state_round_trips_on_the_cuda_path():
    params, ours = on_gpu(implementation="cuda")
    steps_on_gpu(ours, params, 3)
    for p in params:
        p.grad = None
    saved = copy.deepcopy(get_optimizer_state_dict(as_model(params), ours))
    twins, other = on_gpu(implementation="cuda")
    other.begin_states()
    set_optimizer_state_dict(as_model(twins), other, saved)
    for i, p in enumerate(twins):
        p.data.copy_(params[i])
        for average, source in zip(other.averages, ours.averages, strict=True):
            average[i].copy_(source[i])
    for p, o in ((params, ours), (twins, other)):
        steps_on_gpu(o, p, 2, first=3)
    assert_same(everything(twins, other), everything(params, ours))


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ("cuda", "torch"))
def test_a_step_does_not_wait_for_the_gpu(implementation):
    params, ours = on_gpu(implementation=implementation)
    steps_on_gpu(ours, params, 1)
    skip = torch.zeros((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.set_lr(0.25)
        ours.step(grad_scale=clip_factor(ours.gradient_norm(), 1.0), skip=skip)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Several processes.


@pytest.mark.usefixtures("torchrun", "heavy")
def test_fsdp_on_two_processes_equals_one(tmp_path):
    env = {**os.environ, "OUT": str(tmp_path / "found"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.run(
        [*command, "-m", "tests.train.optim_ranks"], cwd=ROOT, env=env, capture_output=True,
        text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    ranks = [torch.load(tmp_path / f"found.{rank}") for rank in range(2)]
    expected = steps()
    assert [int(found.pop("empty shards")) for found in ranks] == [0, 2]
    del expected["empty shards"]
    assert 0 < (expected["norms"] > MAX_NORM).sum() < len(expected["norms"])
    for found in ranks:
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            difference = (found[name] - values).norm()
            assert difference <= 1e-6 * values.norm(), name
    assert expected["first.weight.step"].item() == len(expected["norms"]) - 1


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_is_none_is_refused_without_a_config_too(decay):
    parameters = [torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match=r"ema_decays are \(.*\), expected values in \[0, 1\)"):
        AdamWEMA(parameters, [[torch.ones(3)]], (decay,))
