"""Spikes of the loss, and the command that goes on before one and past the data that made it."""

import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import median_abs_deviation

pytest.importorskip("lance")

from benchmarks.faults import chaos
from repa_fast.checkpoint.layout import steps as steps_of
from repa_fast.configs import presets
from repa_fast.configs.flags import flags_of, parse_config
from repa_fast.data.digits import prepare_digits
from repa_fast.data.order import SampleOrder
from repa_fast.train import checkpoint, graph, spikes
from repa_fast.train import run as runs
from repa_fast.train.resume import resume
from repa_fast.train.spikes import History, TrainingDiverged, is_spike
from repa_fast.train.step import draw_local, synthetic_batch, train_step
from tests.train.test_runs import ROOT, start

ROWS = 1500
BATCH = 12
STEPS = 24


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    return str(prepare_digits(tmp_path_factory.mktemp("data") / "digits"))


@pytest.fixture
def run_config(config, digits_dir, tmp_path):
    """Reads the loss at every step; checkpoints at 5, 10, ..."""

    def make(**overrides):
        values = {
            "data_dir": digits_dir,
            "output_dir": str(tmp_path),
            "exp_name": "run",
            "enc_type": "none",
            "max_train_steps": STEPS,
            "log_every": 1,
            "checkpointing_steps": 5,
            "stop_on_spike": True,
        }
        return config(**{**values, **overrides})

    return make


class Recorder:
    """Stands in for train_step: keeps what each step saw, and throws the weights at some data.

    Attributes:
        seen: (step, data step, rows of the dataset) of every step, in the order they ran.
        state: of the run.
    """

    def __init__(self, poisoned=(), scale=3.0, stop_after=None) -> None:
        self.poisoned, self.scale, self.stop_after = set(poisoned), scale, stop_after
        self.seen, self.state = [], None

    def __call__(self, state, batch) -> None:
        self.state = state
        self.seen.append((state.step, state.data_step, batch["index"].tolist()))
        bad = state.data_step in self.poisoned
        train_step(state, batch)
        if bad:
            with torch.no_grad():
                state.model.final_layer.linear.bias.add_(self.scale)
        if len(self.seen) == self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture
def record(monkeypatch):
    def install(**options) -> Recorder:
        recorder = Recorder(**options)
        monkeypatch.setattr(graph, "train_step", recorder)
        return recorder

    return install


def parameters(state) -> list[torch.Tensor]:
    return [*state.model.state_dict().values(), *state.ema.state_dict().values()]


def assert_same(a, b) -> None:
    assert (a.step, a.history) == (b.step, b.history)
    assert all(torch.equal(x, y) for x, y in zip(parameters(a), parameters(b), strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_a_spike_is_six_robust_deviations_up(seed):
    losses = np.random.default_rng(seed).normal(1.0, 0.05, spikes.WINDOW)
    edge = np.median(losses) + 6 * median_abs_deviation(losses, scale="normal")
    assert is_spike(edge + 1e-3, list(losses))
    assert not is_spike(edge - 1e-3, list(losses))
    losses[:4] = 100.0  # earlier spikes hide no later one
    assert is_spike(2.0, list(losses))


@pytest.mark.parametrize(
    "loss, expected",
    [(1.09, False), (1.11, True), (0.1, False), (float("nan"), True), (float("inf"), True)],
)
def test_a_spike_is_a_tenth_up_where_nothing_varies(loss, expected):
    assert is_spike(loss, [1.0] * spikes.ENOUGH) is expected
    assert not is_spike(loss, [1.0] * (spikes.ENOUGH - 1))


def test_a_falling_loss_and_a_noisy_one_are_no_spikes():
    rng = np.random.default_rng(0)
    falling = 0.2 + np.exp(-np.arange(400) / 60) + rng.normal(0, 0.02, 400)
    for end in range(1, 400):
        recent = list(falling[max(0, end - spikes.WINDOW) : end])
        assert not is_spike(falling[end], recent), end


def test_history_is_saved_and_restored(make_state, tmp_path):
    state = make_state()
    train_step(state, synthetic_batch(state, BATCH)[0])
    for step in range(spikes.WINDOW + 3):
        state.history.add(step, 1 / (step + 3))
    state.history.skipped = 17
    checkpoint.save(tmp_path, state)
    counters = checkpoint.path_of(tmp_path, 1) / checkpoint.COUNTERS
    expected = [1 / (step + 3) for step in range(3, spikes.WINDOW + 3)]
    for rollbacks in ({}, {"rollbacks": 2}):  # as earlier versions saved them
        saved = json.loads(counters.read_text())
        counters.write_text(json.dumps(saved | {"history": saved["history"] | rollbacks}))
        other = make_state()
        checkpoint.load(counters.parent, other)
        assert other.history == History(17, spikes.WINDOW + 2, expected)
        assert other.data_step == 18


def test_skipped_data_is_that_of_later_steps(make_state):
    state, other = make_state(), make_state()
    state.step, other.step = 9, 4
    other.history.skipped = 5
    for ours, theirs in zip(draw_local(state), draw_local(other), strict=True):
        assert torch.equal(ours, theirs)


def diverged(config) -> tuple[str, list[str]]:
    """(message, command) of a run that stops because it diverged; no command if there is none."""
    with pytest.raises(TrainingDiverged) as stopped:
        runs.train(config)
    message, *command = str(stopped.value).split("\n")
    return message, shlex.split(command[0]) if command else []


def config_of(command: list[str]):
    """The config of a printed command of one process."""
    return parse_config(command[command.index("train") + 1 :])


def gone_on(command: list[str], record, poisoned) -> Recorder:
    """The steps of the run that a command begins, with the same data as bad as before."""
    steps = record(poisoned=poisoned)
    runs.train(config_of(command))
    return steps


def test_a_spike_stops_the_run_and_the_next_one_takes_later_data(run_config, record, tmp_path):
    """The data of step 17 spoils the weights: seen after step 18; on from 15 with data of 19."""
    steps = record(poisoned=[17])
    message, command = diverged(run_config())
    last = tmp_path / "run" / "checkpoints" / "0000015"
    assert re.match(r"the loss of denoising is \S+ at step 19, after a median of ", message)
    assert f"the last good checkpoint is {last}, " in message
    assert [step for step, _, _ in steps.seen] == list(range(19))
    assert checkpoint.steps(last.parent) == [5, 10, 15]
    assert message in (tmp_path / "run" / "logs" / "error-rank0.txt").read_text()
    config = config_of(command)
    assert (config.resume, config.skip_steps, config.exp_name) == (str(last), 4, "run-from-15")
    same = config_of([*command, "--exp-name=run", "--resume=never", "--skip-steps=0"])
    assert same == run_config()
    steps = gone_on(command, record, [17])
    assert [(step, data) for step, data, _ in steps.seen] == [(s, s + 4) for s in range(15, STEPS)]
    order = SampleOrder(ROWS, BATCH, seed=0)
    for _, data, rows in steps.seen:
        assert rows == order.rows(data).tolist()
    record(poisoned=[17])
    again = diverged(run_config(resume="auto"))[1]
    assert config_of(again).exp_name == "run-from-15-again"


def test_the_command_survives_kills_and_skips_once(run_config, record, tmp_path):
    """Verbatim, killed before its first checkpoint, verbatim again, killed after it, resumed."""
    record(poisoned=[17])
    _, command = diverged(run_config(max_train_steps=48, checkpointing_steps=15))
    run, whole = tmp_path / "run-from-15", tmp_path / "whole"
    printed = subprocess.run(
        shlex.join(command), shell=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert printed.returncode == 0, printed.stderr
    run.rename(whole)
    for line, saved in ((r"step 17/", []), (r"checkpoint \S+/0000030 ", [30])):
        process = start(command)
        assert any(re.match(line, printed) for printed in process.stdout)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        assert checkpoint.steps(run / "checkpoints") == saved
    resumed = start([*command, "--resume=auto"])
    output, _ = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, output
    assert "going on from" in output and "0000030" in output
    assert chaos.differences(run, whole) == []
    last = checkpoint.path_of(run / "checkpoints", 48)
    assert json.loads((last / checkpoint.COUNTERS).read_text())["history"]["skipped"] == 4


def test_data_is_skipped_once_from_where_a_run_begins(make_state, tmp_path):
    """From another run's checkpoint, as often as none of its own is there; not from its own."""
    state = make_state()
    state.history.skipped = 3
    other, own = tmp_path / "other", tmp_path / "own"
    first = checkpoint.save(other, state)
    for _ in range(2):
        begun = make_state(resume=str(first), skip_steps=4)
        assert resume(own, begun) == first and begun.history.skipped == 7
    last = checkpoint.save(own, begun)
    for wanted in ("auto", str(last), str(own)):
        again = make_state(resume=wanted, skip_steps=4)
        assert resume(own, again) == last and again.history.skipped == 7
    fresh = make_state(skip_steps=4)
    assert resume(tmp_path / "none", fresh) is None and fresh.data_step == 4
    with pytest.raises(ValueError, match=r"skip_steps is 9, .*--resume .*0000000 --exp-name NEW"):
        resume(own, make_state(resume="auto", skip_steps=9))


@pytest.mark.parametrize("name", presets.PRESETS)
def test_flags_give_the_config(name):
    config = presets.get(name)
    assert parse_config(flags_of(config)) == config


def test_without_the_flag_a_spike_is_left_alone(run_config, record):
    steps = record(poisoned=[17])
    runs.train(run_config(stop_on_spike=False, max_train_steps=20))
    assert [step for step, _, _ in steps.seen] == list(range(20))


@pytest.mark.usefixtures("heavy")
def test_a_spike_before_the_first_checkpoint_leaves_none_to_go_on_from(run_config, record):
    record(poisoned=[17])
    message, command = diverged(run_config(checkpointing_steps=50, max_train_steps=20))
    assert message.endswith("; there is no good checkpoint to go on from") and not command


@pytest.mark.parametrize(
    "log_every, checkpointing_steps, poisoned, noticed, source",
    [(2, 7, 20, 22, 14), (1, 5, 14, 16, 10), (1, 5, 15, 17, 15)],
    ids=["saved between readings", "saved at a reading", "saved before"],
)
def test_a_checkpoint_without_a_good_reading_after_it_is_not_trusted(
    run_config, record, log_every, checkpointing_steps, poisoned, noticed, source
):
    """What the data of step 14 spoils is saved at 15, whose reading has not seen it yet."""
    steps = record(poisoned=[poisoned])
    command = diverged(run_config(log_every=log_every, checkpointing_steps=checkpointing_steps))[1]
    assert [s for s, _, _ in steps.seen] == [*range(noticed)]
    config = config_of(command)
    assert (Path(config.resume).name, config.skip_steps) == (f"{source:07d}", noticed - source)


def test_non_finite_steps_name_a_good_checkpoint_as_well(run_config, record, tmp_path):
    """Weights that overflow at step 17 make all later steps non-finite; three are enough."""
    steps = record(poisoned=[17], scale=float("inf"))
    message, command = diverged(run_config(max_bad_steps=3, stop_on_spike=False))
    assert [s for s, _, _ in steps.seen] == [*range(21)]
    assert re.match(
        r"3 consecutive steps up to step 21 .*; saved to \S+/0000021; the last ", message
    )
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == 21
    steps = gone_on(command, record, [17])
    assert [seen[:2] for seen in steps.seen] == [(s, s + 6) for s in range(15, STEPS)]
    assert all(p.isfinite().all() for p in parameters(steps.state))


@pytest.mark.usefixtures("heavy")
def test_a_damaged_checkpoint_is_passed_over(run_config, record, monkeypatch, tmp_path):
    steps = record(poisoned=[17])
    stepped = steps.__call__

    def damaging(state, batch):
        if state.data_step == 16:
            folder, deadline = tmp_path / "run" / "checkpoints", time.monotonic() + 60
            while 15 not in steps_of(folder):  # it is written beside training
                assert time.monotonic() < deadline
                time.sleep(0.01)
            shard = next(checkpoint.path_of(folder, 15).glob("*.distcp"))
            shard.write_bytes(shard.read_bytes()[:-1])
        stepped(state, batch)

    monkeypatch.setattr(graph, "train_step", damaging)
    config = config_of(diverged(run_config())[1])
    assert (Path(config.resume).name, config.skip_steps) == ("0000010", 9)


@pytest.mark.usefixtures("heavy")
def test_checkpoints_with_encoders_that_were_dropped_are_not_gone_back_to(run_config, record):
    """Alignment ends at 16, after the last checkpoint; before, going back is fine."""
    aligned = {"enc_type": "digits-vit", "align_until": 16, "max_train_steps": 20}
    record(poisoned=[17])
    assert diverged(run_config(**aligned))[1] == []
    record(poisoned=[13])
    command = diverged(run_config(**aligned, exp_name="before"))[1]
    steps = gone_on(command, record, [13])
    assert [s for s, _, _ in steps.seen] == [*range(10, 20)]
    assert not steps.state.aligns


def test_fp16_goes_on_exactly_with_its_scale(make_state, tmp_path):
    """Scale and steps since its last change, through an overflow and a growth after the resume."""
    state = make_state(mixed_precision="fp16")
    batch, _ = synthetic_batch(state, BATCH)
    state.scaler.set_growth_interval(3)
    for _ in range(2):
        train_step(state, batch)
    checkpoint.save(tmp_path, state)
    other = make_state(mixed_precision="fp16")
    checkpoint.load(checkpoint.path_of(tmp_path, 2), other)
    assert other.scaler.state_dict() == state.scaler.state_dict()
    assert other.scaler.state_dict()["_growth_tracker"] > 0
    for spoilt in (1.0, float("inf"), 1.0, 1.0):
        for one in (state, other):
            train_step(one, {**batch, "moments": batch["moments"] * spoilt})
        assert other.scaler.state_dict() == state.scaler.state_dict()
    assert_same(state, other)


@pytest.mark.usefixtures("heavy")
def test_qk_norm_trains_samples_and_resumes(run_config, record):
    sampling = {"sampling_steps": 8, "num_steps": 2, "cfg_scale": 1.0}
    whole = record()
    run = runs.train(run_config(qk_norm=True, max_train_steps=8, exp_name="whole", **sampling))
    assert (run / "samples.png").stat().st_size > 1000
    record(stop_after=6)
    with pytest.raises(KeyboardInterrupt):
        runs.train(run_config(qk_norm=True, max_train_steps=8))
    rest = record()
    runs.train(run_config(qk_norm=True, max_train_steps=8, resume="auto"))
    assert_same(rest.state, whole.state)
    weight = rest.state.model.state_dict()["blocks.0.attn.q_norm.weight"]
    assert not torch.equal(weight, torch.ones_like(weight))
