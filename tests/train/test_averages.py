"""Schedules of the learning rate and of the averages of the weights, through steps and files."""

import math

import pytest
import torch

from repa_fast.checkpoint.export import export
from repa_fast.train import checkpoint
from repa_fast.train.memory import describe
from repa_fast.train.optim import ema_rates, ema_warnings, learning_rate
from repa_fast.train.step import synthetic_batch, train_step
from tests.refusals import refused
from tests.train.adamw import copies, flat, follow
from tests.train.conftest import assert_same, resumed, tiny_config
from tests.train.runs import assert_same_state


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


# The decay of the averages.


@pytest.mark.usefixtures("heavy")
def test_the_warm_up_of_the_decay_is_that_of_diffusers():
    EMAModel = pytest.importorskip("diffusers.training_utils").EMAModel
    decays = (0.9999, 0.995, 0.5, 0.0)
    config = tiny_config(ema_decay=",".join(map(str, decays)), ema_warmup=True)
    theirs = [EMAModel([], d, use_ema_warmup=True, inv_gamma=1.0, power=0.75) for d in decays]
    for step in (*range(3000), 9_999, 215_442, 215_443, 215_444, 10**6):
        expected = tuple(1 - each.get_decay(step + 1) for each in theirs)  # they count it first
        assert ema_rates(config, step) == expected


def test_the_decay_warms_up_from_nothing_to_its_own_value():
    """1 - decay is (1 + step)^(-3/4): 1, 1/8, 1/64, ... down to that of each average."""
    config = tiny_config(ema_decay="0.9999,0.995,0.5,0.0", ema_warmup=True)
    assert ema_rates(config, 0) == (1, 1, 1, 1)
    assert ema_rates(config, 15) == (0.125, 0.125, 0.5, 1)
    assert ema_rates(config, 255) == (1 / 64, 1 / 64, 0.5, 1)
    assert ema_rates(config, 4095) == (1 / 512, 1 - 0.995, 0.5, 1)
    assert ema_rates(config, 215_442)[0] > 1 - 0.9999 == ema_rates(config, 215_443)[0]


def test_without_warm_up_the_decay_is_constant():
    config = tiny_config(ema_decay="0.9999,0.5")
    assert {ema_rates(config, step) for step in (0, 1, 10**6)} == {(1 - 0.9999, 0.5)}


def test_a_run_that_is_stopped_inside_the_warm_up_goes_on_to_the_same_bits(make_state, tmp_path):
    """The averages are those of the formula, and after the first step the weights themselves."""
    options = {"ema_decay": "0.9,0.5", "ema_warmup": True, "enc_type": "none"}
    straight, stopped, resumed = (make_state(**options) for _ in range(3))
    batch, _ = synthetic_batch(straight, 12)
    averages = [copies(straight.model.parameters()) for _ in range(2)]
    for step in range(6):
        train_step(straight, batch)
        decays = [min(decay, 1 - (1 + step) ** -0.75) for decay in (0.9, 0.5)]
        follow(averages, decays, list(straight.model.parameters()))
        for ema, expected in zip((straight.ema, *straight.more_emas), averages, strict=True):
            torch.testing.assert_close(flat(ema.parameters()), flat(expected), rtol=0, atol=1e-6)
        if step == 0:
            torch.testing.assert_close(*map(flat, (averages[0], straight.model.parameters())))
    for _ in range(2):
        train_step(stopped, batch)
    checkpoint.load(checkpoint.save(tmp_path, stopped), resumed)
    for _ in range(4):
        train_step(resumed, batch)
    assert_same_state(resumed, straight)


HELD = (
    "warning: an EMA of decay {} still holds {} % of the initial weights after {} steps: "
    "expected --ema-warmup, or a lower --ema-decay"
)


def test_an_average_that_cannot_forget_the_initial_weights_is_told():
    assert ema_warnings(tiny_config(ema_decay="0.9999"), 1600) == [HELD.format(0.9999, 85, 1600)]
    both = tiny_config(ema_decay="0.9999,0.995,0.9996")
    assert ema_warnings(both, 2000) == [
        HELD.format(0.9999, 82, 2000),
        HELD.format(0.9996, 45, 2000),
    ]
    assert ema_warnings(both, 10_001) == []
    assert ema_warnings(tiny_config(ema_decay="0.9999", ema_warmup=True), 1) == []
    assert ema_warnings(tiny_config(ema_decay="0"), 1) == []


def test_a_run_and_a_dry_run_tell_it(train):
    line = HELD.format(0.9, 59, 5)
    log = (train(ema_decay="0.9", enc_type="none") / "log.txt").read_text()
    assert line in log
    short = tiny_config(ema_decay="0.9", max_train_steps=5)
    assert describe(short).splitlines()[-1] == line
    assert "warning" not in describe(tiny_config())


@pytest.mark.parametrize("decays, saved", (("0.9", "0.9,0.5"), ("0.9,0.5,0.1", "0.9")))
def test_another_number_of_averages_is_refused_by_its_flag(make_state, tmp_path, decays, saved):
    checkpoint.save(tmp_path, make_state(ema_decay=saved))
    other = make_state(ema_decay=decays, resume="auto")
    held = f"holds {saved.count(',') + 1} EMAs.*expected .*--ema-decay {decays}"
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
