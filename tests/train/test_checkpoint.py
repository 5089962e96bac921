"""What a checkpoint holds, and what comes back from it."""

import json
from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn

from repa_fast.checkpoint import layout as weights
from repa_fast.checkpoint import writer
from repa_fast.train import checkpoint, spikes
from repa_fast.train.spikes import History
from repa_fast.train.step import synthetic_batch, train_step
from tests.refusals import refused
from tests.sealing import reseal
from tests.train.conftest import assert_same, tiny_state
from tests.train.runs import assert_same_state


@pytest.mark.parametrize(
    "change, words",
    [
        ({"step": 10**30}, "step is 1000.*, expected a whole number below"),
        ({"world_size": "2"}, "world_size is '2'"),
        ({"micro_batch": -3}, "micro_batch is -3"),
        ({"history": 5}, "history is 5, expected"),
        ({"history": {"skipped": 2.5}}, "skipped is 2.5"),
        ({"history": {"losses": ["x"]}}, "a loss of 'x'"),
        ({"metrics": {"sums": [], "bad_run": 0}}, "sums of metrics are"),
        ({"metrics": {"sums": [[7.0]], "bad_run": 0}}, r"sums of metrics are \(1, 1\)"),
        ({"metrics": []}, "is not what a run counts"),
    ],
    ids=range(9),
)
def test_counters_that_no_run_has_are_refused(tmp_path, change, words):
    state = tiny_state(enc_type="none")
    target = checkpoint.save(tmp_path, state).rename(tmp_path / "best")
    counters = json.loads((target / checkpoint.COUNTERS).read_text())
    (target / checkpoint.COUNTERS).write_text(json.dumps(counters | change))
    refused(partial(checkpoint.load, reseal(target), state), "best", words)


@pytest.mark.parametrize("mixed_precision", ["no", "fp16"])
def test_round_trip_restores_every_tensor_and_counter(tmp_path, mixed_precision):
    """In fp16 it goes on through an overflow and a growth of the scale, whose steps count on."""
    state, other = (tiny_state(mixed_precision=mixed_precision) for _ in range(2))
    batch, _ = synthetic_batch(state, 12)
    state.scaler.set_growth_interval(3)
    for _ in range(2):
        train_step(state, batch)
    if mixed_precision == "fp16":
        state.scaler.update(256.0)
    checkpoint.load(checkpoint.save(tmp_path, state), other)
    assert other.micro_batch == state.micro_batch
    assert_same_state(other, state)
    if mixed_precision == "fp16":
        assert other.scaler.get_scale() == 256.0
        assert other.scaler.state_dict()["_growth_tracker"] > 0
    for spoilt in (1.0, float("inf"), 1.0, 1.0):
        for one in (state, other):
            train_step(one, {**batch, "moments": batch["moments"] * spoilt})
        assert_same_state(other, state)


def test_history_is_saved_and_restored(tmp_path):
    state = tiny_state(enc_type="none")
    train_step(state, synthetic_batch(state, 12)[0])
    for step in range(spikes.WINDOW + 3):
        state.history.add(step, 1 / (step + 3))
    state.history.skipped = 17
    counters = checkpoint.save(tmp_path, state) / checkpoint.COUNTERS
    expected = [1 / (step + 3) for step in range(3, spikes.WINDOW + 3)]
    for rollbacks in ({}, {"rollbacks": 2}):  # as earlier versions saved them
        saved = json.loads(counters.read_text())
        counters.write_text(json.dumps(saved | {"history": saved["history"] | rollbacks}))
        reseal(counters.parent)
        other = tiny_state(enc_type="none")
        checkpoint.load(counters.parent, other)
        assert other.history == History(17, spikes.WINDOW + 2, expected)
        assert other.data_step == 18


def test_marker_is_written_last_and_half_written_directories_are_ignored(tmp_path, monkeypatch):
    state = tiny_state(enc_type="none")
    state.step = 2
    checkpoint.save(tmp_path, state)
    state.step = 3
    crash = mock.Mock(side_effect=OSError("no space left on device"))
    with monkeypatch.context() as patched:
        patched.setattr(writer, "write_marker", crash)
        patched.setattr(writer.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(checkpoint.CheckpointFailed, match=r"0000003 .*no space.*0000002"):
            checkpoint.save(tmp_path, state)
    half = checkpoint.path_of(tmp_path, 3)
    assert half.exists() and checkpoint.steps(tmp_path) == [2]
    for load, into in ((checkpoint.load, state), (weights.load_weights, state.model)):
        refused(partial(load, half, into), "0000003 is not a complete checkpoint")
    (half / "leftover").touch()
    checkpoint.save(tmp_path, state)
    assert checkpoint.steps(tmp_path) == [2, 3]
    assert not (half / "leftover").exists()


def test_saving_before_the_first_step_moves_nothing(tmp_path):
    state = tiny_state(enc_type="none")
    with torch.no_grad():
        for average in state.ema.parameters():
            average.add_(1)
    models = nn.ModuleList([state.model, state.ema])
    expected = [p.clone() for p in models.parameters()]
    checkpoint.save(tmp_path, state)
    assert_same(models.parameters(), expected)
    assert state.optimizer.state
    assert not any(v.any() for values in state.optimizer.state.values() for v in values.values())
