"""Schedules of the learning rate, and the averages of the weights, through steps and files."""

import math

import pytest
import torch
from torch import nn

from repa_fast.checkpoint.export import export
from repa_fast.train import checkpoint
from repa_fast.train.optim import learning_rate
from repa_fast.train.resume import resume
from repa_fast.train.step import synthetic_batch, train_step
from tests.refusals import refused
from tests.train.adamw import flat, follow
from tests.train.conftest import assert_same, tiny_config


def rates(**options):
    config = tiny_config(learning_rate=0.5, max_train_steps=20, **options)
    return [learning_rate(config, step) for step in range(25)]


def test_the_learning_rate_is_constant_after_a_linear_warm_up():
    assert set(rates()) == {0.5}
    found = rates(warmup_steps=5)
    assert found[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert set(found[5:]) == {0.5}


@pytest.mark.parametrize("warmup", (0, 1, 5, 19, 20))
def test_cosine_falls_from_the_learning_rate_to_its_end(warmup):
    found = rates(lr_schedule="cosine", min_learning_rate=0.125, warmup_steps=warmup)
    after = found[warmup:]
    assert after[0] == 0.5 and after[-1] == 0.125
    assert all(a >= b for a, b in zip(after, after[1:]))
    assert all(r == 0.125 for r in found[max(20, warmup + 1) :])
    if warmup == 0:
        assert found[10] == pytest.approx((0.5 + 0.125) / 2)
        assert found[5] == pytest.approx(0.125 + 0.375 * (1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize(
    "name, value",
    [("warmup_steps", -1), ("min_learning_rate", -0.1), ("min_learning_rate", 0.6)],
)
def test_schedules_that_make_no_sense_are_refused(name, value):
    options = {"learning_rate": 0.5, "lr_schedule": "cosine", name: value}
    refused(lambda: tiny_config(**options), name)


def emas(state):
    return [state.ema, *state.more_emas]


@pytest.fixture
def take_steps(make_state):
    """(number, states...) -> take that many steps on one batch in each of them."""
    batch, _ = synthetic_batch(make_state(), 12)

    def take(count, *states):
        for state in states:
            for _ in range(count):
                train_step(state, batch)

    return take


def test_30_train_steps_equal_plain_torch_on_the_recorded_gradients(make_state, monkeypatch):
    state = make_state(
        optimizer_impl="torch", adam_weight_decay=0.1, ema_decay="0.9,0.5", max_grad_norm=0.05,
        lr_schedule="cosine", warmup_steps=5, max_train_steps=30, learning_rate=4e-3,
    )  # fmt: skip
    assert len(state.more_emas) == 1 and state.optimizer.ema_decays == (0.9, 0.5)
    params = [nn.Parameter(p.detach().clone()) for p in state.model.parameters()]
    averages = [[p.detach().clone() for p in ema.parameters()] for ema in emas(state)]
    recorded, measure = [], state.optimizer.gradient_norm

    def recording():
        grads = [p.grad for p in state.model.parameters()]
        recorded.append([None if g is None else g.clone() for g in grads])
        return measure()

    monkeypatch.setattr(state.optimizer, "gradient_norm", recording)
    optimizer = torch.optim.AdamW(params, weight_decay=0.1, foreach=False)
    for step in range(30):
        batch, _ = synthetic_batch(state, 12)
        if step == 11:
            batch["moments"].fill_(math.nan)
        train_step(state, batch)
        rate = learning_rate(state.config, step)
        assert state.optimizer.param_groups[0]["lr"].item() == pytest.approx(rate, rel=1e-6)
        if step == 11:
            continue
        for p, g in zip(params, recorded[-1], strict=True):
            p.grad = g
        nn.utils.clip_grad_norm_(params, 0.05)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        follow(averages, (0.9, 0.5), params)
    pairs = [(state.model, params), *zip(emas(state), averages, strict=True)]
    for ours, expected in pairs:
        found, expected = flat(ours.parameters()), flat(expected)
        assert (found - expected).norm() <= 1e-6 * expected.norm()
    torch.testing.assert_close(flat(state.model.parameters()), flat(params), rtol=0, atol=1e-6)
    assert (flat(params) - flat(averages[0])).norm() > 1e-3
    for ema in emas(state):
        assert not ema.training and not any(p.requires_grad for p in ema.parameters())


def test_checkpoints_hold_every_average_and_training_goes_on_bit_for_bit(
    make_state, take_steps, tmp_path
):
    state = make_state(ema_decay="0.9,0.5")
    take_steps(2, state)
    checkpoint.save(tmp_path, state)
    other = make_state(ema_decay="0.9,0.5", resume="auto", seed=5)
    other.config.seed = state.config.seed
    resume(tmp_path, other)
    take_steps(2, state, other)
    for mine, theirs in zip((state.model, *emas(state)), (other.model, *emas(other)), strict=True):
        assert_same(theirs.parameters(), mine.parameters())
    a, b = ([*s.optimizer.state_dict()["state"].values()] for s in (state, other))
    for x, y in zip(a, b, strict=True):
        assert_same(x.values(), y.values())


@pytest.mark.parametrize("decays, saved", (("0.9", "0.9,0.5"), ("0.9,0.5,0.1", "0.9")))
def test_another_number_of_averages_is_refused_by_its_flag(make_state, tmp_path, decays, saved):
    checkpoint.save(tmp_path, make_state(ema_decay=saved))
    other = make_state(ema_decay=decays, resume="auto")
    held = f"holds {saved.count(',') + 1} averages.*expected .*--ema-decay {decays}"
    refused(lambda: resume(tmp_path, other), held)


def test_an_official_file_fills_every_average(make_state, take_steps, tmp_path):
    state = make_state(ema_decay="0.9")
    take_steps(2, state)
    checkpoint.save(tmp_path, state)
    export(checkpoint.path_of(tmp_path, 2), "official", tmp_path / "0000002.pt")
    other = make_state(ema_decay="0.9,0.5,0.25", resume=str(tmp_path / "0000002.pt"))
    resume(tmp_path / "none", other)
    assert other.step == 2
    for ema in emas(other):
        assert_same(ema.parameters(), state.ema.parameters())
    take_steps(1, other)
    assert len({flat(ema.parameters()).sum().item() for ema in emas(other)}) == 3
