"""Spikes of the loss, and the command that goes on before one and past the data that made it."""

import dataclasses
import json
import re
import shlex
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import median_abs_deviation

pytest.importorskip("lance")

from benchmarks.faults.chaos import differences
from repa_fast.configs import presets
from repa_fast.configs.build import fit_to_data
from repa_fast.configs.flags import flags_of, parse, parse_config
from repa_fast.data.digits import digits_metadata
from repa_fast.data.order import SampleOrder
from repa_fast.eval.load import load
from repa_fast.train import checkpoint, graph, spikes
from repa_fast.train import run as runs
from repa_fast.train.inherit import inherit
from repa_fast.train.resume import last_good, stop_if_diverged
from repa_fast.train.spikes import TrainingDiverged, is_spike
from repa_fast.train.step import draw_local, train_step
from tests.refusals import refused
from tests.train.conftest import ALONE, assert_same, config_of_run, resumed, tiny_state
from tests.train.runs import ended, start, until

STEPS = 16


@pytest.fixture
def run_config(digits_dir, tmp_path, monkeypatch):
    """Reads the loss at every step; checkpoints at 5, 10, ...; draws no plot at the end."""
    monkeypatch.setattr(runs, "plot_losses", lambda *_: None)
    options = {"enc_type": "none", "max_train_steps": STEPS, "checkpointing_steps": 5}
    options |= {"stop_on_spike": True}
    return lambda **overrides: config_of_run(digits_dir, tmp_path / "run", **options | overrides)


class Recorder:
    """Stands in for train_step: notes what each step saw, and throws the weights at some data.

    seen: (step, data step, rows of the dataset) of every step, in the order they ran.
    """

    def __init__(self, poisoned: int, scale: float = 3.0) -> None:
        self.poisoned, self.scale, self.seen, self.state = poisoned, scale, [], None

    def __call__(self, state, batch) -> None:
        self.state = state
        self.seen.append((state.step, state.data_step, batch["index"].tolist()))
        bad = state.data_step == self.poisoned
        train_step(state, batch)
        if bad:
            with torch.no_grad():
                state.model.final_layer.linear.bias.add_(self.scale)

    @property
    def steps(self) -> list[tuple[int, int]]:
        """(step, data step) of every step."""
        return [seen[:2] for seen in self.seen]


@pytest.fixture
def record(monkeypatch):
    def install(poisoned: int, **options) -> Recorder:
        recorder = Recorder(poisoned, **options)
        monkeypatch.setattr(graph, "train_step", recorder)
        return recorder

    return install


@pytest.mark.parametrize("seed", range(5))
def test_a_spike_is_six_robust_deviations_up(seed):
    losses = np.random.default_rng(seed).normal(1.0, 0.05, spikes.WINDOW)
    edge = np.median(losses) + 6 * median_abs_deviation(losses, scale="normal")
    assert is_spike(edge + 1e-3, list(losses))
    assert not is_spike(edge - 1e-3, list(losses))
    losses[:4] = 100.0  # earlier spikes hide no later one
    assert is_spike(2.0, list(losses))


def test_a_spike_is_a_tenth_up_where_nothing_varies():
    for loss, spike in ((1.09, False), (1.11, True), (0.1, False), (np.nan, True), (np.inf, True)):
        assert is_spike(loss, [1.0] * spikes.ENOUGH) is spike
        assert not is_spike(loss, [1.0] * (spikes.ENOUGH - 1))


def test_a_falling_loss_and_a_noisy_one_are_no_spikes():
    rng = np.random.default_rng(0)
    falling = 0.2 + np.exp(-np.arange(400) / 60) + rng.normal(0, 0.02, 400)
    for end in range(1, 400):
        recent = list(falling[max(0, end - spikes.WINDOW) : end])
        assert not is_spike(falling[end], recent), end


def test_skipped_data_is_that_of_later_steps():
    state, other = tiny_state(enc_type="none"), tiny_state(enc_type="none")
    state.step, other.step = 9, 4
    other.history.skipped = 5
    assert_same(draw_local(other), draw_local(state))


def diverged(config) -> tuple[str, list[str]]:
    """(message, command) of a run that stops because it diverged."""
    with pytest.raises(TrainingDiverged) as stopped:
        runs.train(config)
    message, command = str(stopped.value).split("\n")
    return message, shlex.split(command)


def config_of(command: list[str]):
    """The config that a printed command of one process trains with."""
    asked = parse(command[command.index("train") + 1 :])
    return inherit(asked, Path(asked.config.resume))[0]


def test_a_spike_stops_the_run_and_the_next_one_takes_later_data(run_config, record, tmp_path):
    """The data of step 10 spoils the weights: seen after step 11; on from 10 with data of 12."""
    steps = record(10)
    message, command = diverged(run_config())
    last = tmp_path / "run" / "checkpoints" / "0000010"
    assert re.match(r"the loss of denoising is \S+ at step 12, after a median of ", message)
    assert f"the last good checkpoint is {last}, " in message
    assert steps.steps == [(step, step) for step in range(12)]
    assert checkpoint.steps(last.parent) == [5, 10]
    assert message in (tmp_path / "run" / "logs" / "error-rank0.txt").read_text()
    config = config_of(command)
    assert (config.resume, config.skip_steps, config.exp_name) == (str(last), 2, "run-from-10")
    same = dataclasses.replace(config, exp_name="run", resume="never", skip_steps=0)
    assert same == fit_to_data(run_config(), digits_metadata())

    steps = record(10)
    runs.train(config)
    assert steps.steps == [(step, step + 2) for step in range(10, STEPS)]
    order = SampleOrder(1500, 12, seed=0)
    for _, data, rows in steps.seen:
        assert rows == order.rows(data).tolist()

    record(10)
    again = diverged(run_config(resume="auto"))[1]
    assert config_of(again).exp_name == "run-from-10-again"


@pytest.mark.usefixtures("heavy", "torchrun")
def test_the_command_survives_kills_and_skips_once(run_config, record, tmp_path):
    """Verbatim, killed before its first checkpoint, verbatim again, killed after it, resumed."""
    record(17)
    _, command = diverged(run_config(max_train_steps=48, checkpointing_steps=15))
    run, whole = tmp_path / "run-from-15", tmp_path / "whole"
    ended(start(["sh", "-c", shlex.join(command)]))
    run.rename(whole)
    for line, saved in ((r"step 17/", []), (r"checkpoint \S+/0000030 ", [30])):
        process = start(command)
        until(process, line)
        process.kill()
        process.communicate(timeout=60)
        assert checkpoint.steps(run / "checkpoints") == saved
    output = ended(start([*command, "--resume=auto"]))
    assert "going on from" in output and "0000030" in output
    assert differences(run, whole) == []
    last = checkpoint.path_of(run / "checkpoints", 48)
    assert json.loads((last / checkpoint.COUNTERS).read_text())["history"]["skipped"] == 4


def test_data_is_skipped_once_from_where_a_run_begins(tmp_path):
    """From another run's checkpoint, as often as none of its own is there; not from its own."""
    asking = partial(tiny_state, enc_type="none")
    state = asking()
    state.history.skipped = 3
    other, own = tmp_path / "other", tmp_path / "own"
    first = checkpoint.save(other, state)
    for _ in range(2):
        begun = asking(resume=str(first), skip_steps=4)
        assert resumed(own, begun) == first and begun.history.skipped == 7
    last = checkpoint.save(own, begun)
    for wanted in ("auto", str(last), str(own)):
        again = asking(resume=wanted, skip_steps=4)
        assert resumed(own, again) == last and again.history.skipped == 7
    fresh = asking(skip_steps=4)
    assert resumed(tmp_path / "none", fresh) is None and fresh.data_step == 4
    more = asking(resume="auto", skip_steps=9)
    refused(partial(resumed, own, more), r"skip_steps is 9, .*--resume .*0000000 --exp-name NEW")


@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("name", presets.PRESETS)
def test_flags_give_the_config(name):
    config = presets.get(name)
    assert parse_config(flags_of(config)) == config


def test_a_spike_is_left_alone_without_the_flag_and_may_leave_nothing_to_go_on_from(tmp_path):
    state, saves = tiny_state(enc_type="none"), checkpoint.Checkpointer(tmp_path, ALONE)
    state.history.losses = [1.0] * spikes.ENOUGH
    reading = {"denoise": 2.0, "skipped": 0}
    stop_if_diverged(saves, state, reading)
    assert state.history.losses[-1] == 2.0
    state.config.stop_on_spike = True
    with pytest.raises(TrainingDiverged, match=r"; there is no good checkpoint to go on from$"):
        stop_if_diverged(saves, state, reading)


@pytest.mark.parametrize(
    "log_every, checkpointing_steps, poisoned, noticed, source",
    [(2, 7, 20, 22, 14), (1, 5, 9, 11, 5)],
)
def test_a_checkpoint_without_a_good_reading_after_it_is_not_trusted(
    run_config, record, log_every, checkpointing_steps, poisoned, noticed, source
):
    """Saved between readings, or at 10, whose reading has not seen yet what data 9 spoilt."""
    steps = record(poisoned)
    every = {"log_every": log_every, "checkpointing_steps": checkpointing_steps}
    config = config_of(diverged(run_config(**every, max_train_steps=24))[1])
    assert len(steps.steps) == noticed
    assert (Path(config.resume).name, config.skip_steps) == (f"{source:07d}", noticed - source)


def test_non_finite_steps_name_a_good_checkpoint_as_well(run_config, record, tmp_path):
    """Weights that overflow at step 10 make all later steps non-finite; three are enough."""
    steps = record(10, scale=float("inf"))
    message, command = diverged(run_config(max_bad_steps=3, stop_on_spike=False))
    assert steps.steps == [(step, step) for step in range(14)]
    assert re.match(r"3 consecutive steps up to step 14 .*; saved to \S+/0000014; the las", message)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == 14
    steps = record(10, scale=float("inf"))
    runs.train(config_of(command))
    assert steps.steps == [(step, step + 4) for step in range(10, STEPS)]
    assert all(tensor.isfinite().all() for tensor in checkpoint.tensors(steps.state).values())


def test_only_whole_checkpoints_with_the_encoders_are_gone_back_to(tmp_path):
    """After 10 is damaged there is 5, unless alignment ended since."""
    state = tiny_state(enc_type="none")
    for state.step in (5, 10):
        checkpoint.save(tmp_path, state)
    state.step, state.history.good_step = 12, 11
    five, ten = (checkpoint.path_of(tmp_path, step) for step in (5, 10))
    assert last_good(tmp_path, state) == ten
    for align_until, step, expected in ((8, 12, ten), (11, 12, None), (12, 12, ten)):
        state.config.align_until, state.step = align_until, step
        assert last_good(tmp_path, state) == expected
    shard = ten / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    for align_until, expected in ((12, five), (8, None)):
        state.config.align_until = align_until
        assert last_good(tmp_path, state) == expected


@pytest.mark.usefixtures("heavy")
def test_qk_norm_trains_samples_and_resumes(train):
    options = {"enc_type": "none", "qk_norm": True, "num_steps": 2, "sampling_steps": 5}
    whole = train("whole", **options)
    train("cut", **options, max_train_steps=2)
    cut = train("cut", **options, resume="auto")
    assert differences(cut, whole) == []
    assert (cut / "samples.png").stat().st_size > 1000
    weight = load(cut).model.state_dict()["blocks.0.attn.q_norm.weight"]
    assert not torch.equal(weight, torch.ones_like(weight))
