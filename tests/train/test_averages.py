"""Schedules of the learning rate, and the averages of the weights, through steps and files."""

import math

import pytest

from repa_fast.checkpoint.export import export
from repa_fast.train import checkpoint
from repa_fast.train.optim import learning_rate
from repa_fast.train.step import synthetic_batch, train_step
from tests.refusals import refused
from tests.train.adamw import flat
from tests.train.conftest import assert_same, resumed, tiny_config


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
    refused(lambda: rates(lr_schedule="cosine", **{name: value}), name)


@pytest.mark.parametrize("decays, saved", (("0.9", "0.9,0.5"), ("0.9,0.5,0.1", "0.9")))
def test_another_number_of_averages_is_refused_by_its_flag(make_state, tmp_path, decays, saved):
    checkpoint.save(tmp_path, make_state(ema_decay=saved))
    other = make_state(ema_decay=decays, resume="auto")
    held = f"holds {saved.count(',') + 1} averages.*expected .*--ema-decay {decays}"
    refused(lambda: resumed(tmp_path, other), held)


def test_an_official_file_fills_every_average(make_state, tmp_path):
    state = make_state(ema_decay="0.9")
    batch, _ = synthetic_batch(state, 12)
    train_step(state, batch)
    train_step(state, batch)
    checkpoint.save(tmp_path, state)
    export(checkpoint.path_of(tmp_path, 2), "official", tmp_path / "0000002.pt")
    other = make_state(ema_decay="0.9,0.5,0.25", resume=str(tmp_path / "0000002.pt"))
    resumed(tmp_path / "none", other)
    assert other.step == 2
    emas = [other.ema, *other.more_emas]
    for ema in emas:
        assert_same(ema.parameters(), state.ema.parameters())
    train_step(other, batch)
    assert len({flat(ema.parameters()).sum().item() for ema in emas}) == 3
