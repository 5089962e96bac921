"""The state of AdamWEMA: torch AdamW's own, through files, devices and gradient scalers."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from repa_fast import ops
from repa_fast.train import optim
from repa_fast.train.optim import AdamWEMA
from tests.refusals import refused
from tests.train import adamw
from tests.train.adamw import give_gradients, make_parameters, our_adamw, torch_adamw
from tests.train.conftest import assert_same

KINDS = ({"foreach": False}, {"fused": True}, {})
"""Of torch's AdamW."""


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_our_state_continues_in_torchs_adamw_and_the_other_way_round(options, tmp_path):
    """Three steps of one, three of the other, through a file, equal six of torch's."""

    def take(optimizer, params, steps):
        for step in steps:
            give_gradients(params, step)
            optimizer.step()

    expected = make_parameters()
    take(torch_adamw(expected, **options), expected, range(6))
    for ours_first in (True, False):
        params = make_parameters()
        both = [our_adamw(params, weight_decay=0.1), torch_adamw(params, **options)]
        first, second = both if ours_first else both[::-1]
        take(first, params, range(3))
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        take(second, params, range(3, 6))
        torch.testing.assert_close(adamw.flat(params), adamw.flat(expected), rtol=1e-6, atol=1e-6)
        assert second.state[params[1]]["step"].item() == 6


def test_state_dict_is_torchs_own():
    params = make_parameters()
    ours, other = our_adamw(params), torch_adamw(params, fused=True, weight_decay=0.0)
    give_gradients(params, 0)
    ours.step()
    other.step()
    states, layouts = [optimizer.state_dict() for optimizer in (ours, other)], []
    for state in states:
        values = state.pop("state")
        layouts.append({i: {k: (v.dtype, v.shape) for k, v in values[i].items()} for i in values})
    assert layouts[0] == layouts[1] and states[0] == states[1]
    assert type(states[0]["param_groups"][0]["lr"]) is float


@pytest.mark.parametrize("how", (copy.deepcopy, pickle.dumps))
def test_a_copy_is_refused(how):
    refused(lambda: how(our_adamw(make_parameters())), "use state_dict", error=TypeError)


def test_reading_the_state_of_a_begun_optimizer_moves_neither_weights_nor_averages():
    """Of one that is not, torch's get_optimizer_state_dict makes it by a step of its own."""
    params = make_parameters()
    ours = our_adamw(params, (0.5, 0.9), weight_decay=0.1)
    torch._foreach_zero_([tensor for average in ours.averages for tensor in average])
    ours.begin_states()
    get_optimizer_state_dict(adamw.as_model(params), ours)
    assert_same(params, make_parameters())
    assert len(ours.state) == 5 and params[adamw.FROZEN] not in ours.state
    assert all(not value.any() for state in ours.state.values() for value in state.values())
    assert all(not t.any() for average in ours.averages for t in average)


# The path of CUDA, without a device.


@pytest.fixture
def fake_cuda(monkeypatch):
    """Parameters on a CUDA device that exists in name only."""
    monkeypatch.setattr(optim, "_lr_to_host", lambda optimizer, state: None)  # no value to read
    monkeypatch.setattr(ops, "why_not_cuda", lambda device: "")
    with FakeTensorMode():
        yield [nn.Parameter(torch.zeros(3, device="cuda")) for _ in range(2)]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_state_of_torchs_adamw_comes_to_the_parameters_device(fake_cuda, options):
    other = torch_adamw([nn.Parameter(torch.zeros(3, device="cuda")) for _ in range(2)], **options)
    for p in other.param_groups[0]["params"]:
        moments = {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
        other.state[p] = {"step": torch.ones(()), **moments}
    ours = AdamWEMA(fake_cuda)
    ours.load_state_dict(other.state_dict())
    for p in fake_cuda:
        assert ours.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert {value.device.type for value in ours.state[p].values()} == {"cuda"}
    assert ours.param_groups[0]["lr"].device.type == "cuda"


def test_every_scalar_of_a_step_is_on_the_parameters_device(fake_cuda, monkeypatch):
    devices = []

    def op(params, *lists, lr, grad_scale, skip, ema_rate, **options):
        devices.append({t.device.type for t in (*params, lr, grad_scale, skip, ema_rate)})

    monkeypatch.setattr(ops, "adamw_ema", op)
    ours = AdamWEMA(fake_cuda, [adamw.copies(fake_cuda)], (0.9,))
    assert ours.implementation == "cuda"
    ours.begin_states()
    get_optimizer_state_dict(adamw.as_model(fake_cuda), ours)
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
        options = {"weight_decay": 0.1, "implementation": implementation}
        optimizer = our_adamw(params, (0.9, 0.5), adamw.make_groups(params), **options)
        for step in range(6):
            give_gradients(params, step)
            optimizer.step(grad_scale=torch.tensor(0.5), skip=torch.tensor(float(step == 2)))
        runs.append(adamw.everything(params, optimizer))
    assert len(calls) == 12
    assert all(c["implementation"] == "cuda" for c in calls)
    assert {c["ema_rate"].item() for c in calls} == {torch.tensor(1 - 0.9).item()}
    assert [len(c["emas"]) for c in calls[:4]] == [2, 3, 2, 2]
    torch.testing.assert_close(*map(adamw.flat, runs), rtol=1e-5, atol=1e-6)
