"""Spikes of the loss, and going back to the last good checkpoint past the data that made one."""

import time

import numpy as np
import pytest
import torch
from scipy.stats import median_abs_deviation

pytest.importorskip("lance")

from repa_fast.checkpoint.layout import steps as steps_of
from repa_fast.data.order import SampleOrder
from repa_fast.prepare.images import prepare_digits
from repa_fast.train import checkpoint, graph, loop, spikes
from repa_fast.train.report import read_metrics
from repa_fast.train.rollback import TrainingDiverged
from repa_fast.train.spikes import History, is_spike
from repa_fast.train.step import draw_local, synthetic_batch, train_step

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
            "rollback": 2,
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
    state.history.rollbacks, state.history.skipped = 2, 17
    checkpoint.save(tmp_path, state)
    other = make_state()
    checkpoint.load(checkpoint.path_of(tmp_path, 1), other)
    expected = [1 / (step + 3) for step in range(3, spikes.WINDOW + 3)]
    assert other.history == History(2, 17, spikes.WINDOW + 2, expected)
    assert other.data_step == 18


def test_skipped_data_is_that_of_later_steps(make_state):
    state, other = make_state(), make_state()
    state.step, other.step = 9, 4
    other.history.skipped = 5
    for ours, theirs in zip(draw_local(state), draw_local(other), strict=True):
        assert torch.equal(ours, theirs)


def test_a_spike_goes_back_and_takes_later_data(run_config, record, tmp_path):
    """The data of step 17 spoils the weights: seen after step 18, back to 15 with data of 19."""
    steps = record(poisoned=[17])
    run = loop.train(run_config())
    history = steps.state.history
    assert (history.rollbacks, history.skipped) == (1, 4)
    expected = [(s, s) for s in range(19)] + [(s, s + 4) for s in range(15, STEPS)]
    assert [(step, data) for step, data, _ in steps.seen] == expected
    order = SampleOrder(ROWS, BATCH, seed=0)
    for _, data, rows in steps.seen:
        assert rows == order.rows(data).tolist()
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == list(
        range(1, STEPS + 1)
    )
    assert max(line["denoise"] for line in read_metrics(run / "metrics.jsonl")) < 3
    log = (run / "log.txt").read_text()
    assert "the loss of denoising is" in log and "going back to" in log and "0000015" in log
    assert checkpoint.steps(run / "checkpoints") == [5, 10, 15, 20, STEPS]


def test_a_run_killed_around_a_rollback_is_the_same_run(run_config, record):
    """Killed between the rollback and the next checkpoint, and again after that checkpoint."""
    whole = record(poisoned=[17])
    loop.train(run_config(exp_name="whole"))
    for steps in (20, 12):
        record(poisoned=[17], stop_after=steps)
        with pytest.raises(KeyboardInterrupt):
            loop.train(run_config(resume="auto"))
    rest = record(poisoned=[17])
    loop.train(run_config(resume="auto"))
    assert rest.seen[0][:2] == (20, 24)
    assert_same(rest.state, whole.state)
    assert rest.state.history.rollbacks == 1


def test_without_rollback_a_spike_is_left_alone(run_config, record):
    steps = record(poisoned=[17])
    loop.train(run_config(rollback=0, max_train_steps=20))
    assert [step for step, _, _ in steps.seen] == list(range(20))


@pytest.mark.slow
def test_a_spike_before_the_first_checkpoint_is_left_alone(run_config, record):
    steps = record(poisoned=[17])
    loop.train(run_config(checkpointing_steps=50, max_train_steps=20))
    assert [step for step, _, _ in steps.seen] == list(range(20))


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
    loop.train(run_config(log_every=log_every, checkpointing_steps=checkpointing_steps))
    assert [s for s, _, _ in steps.seen] == [*range(noticed), *range(source, STEPS)]
    assert steps.state.history.skipped == noticed - source


@pytest.mark.slow
def test_rollbacks_run_out(run_config, record, tmp_path):
    """The data of steps 17, 20 and 22 spoils the weights; the third time is one too many."""
    steps = record(poisoned=[17, 20, 22])
    with pytest.raises(TrainingDiverged, match=r"denoising is .* after 2 rollbacks"):
        loop.train(run_config())
    data = [data for _, data, _ in steps.seen]
    assert data == list(range(24)) and steps.state.step == 17
    folder = tmp_path / "run" / "checkpoints"
    assert checkpoint.steps(folder)[-1] == 15
    assert "error-rank0.txt" in {path.name for path in (tmp_path / "run" / "logs").iterdir()}


def test_non_finite_steps_go_back_as_well(run_config, record):
    """Weights that overflow at step 17 make all later steps non-finite; three are enough."""
    steps = record(poisoned=[17], scale=float("inf"))
    loop.train(run_config(max_bad_steps=3))
    assert [s for s, _, _ in steps.seen] == [*range(21), *range(15, STEPS)]
    assert steps.state.history.skipped == 6
    assert all(p.isfinite().all() for p in parameters(steps.state))


@pytest.mark.slow
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
    loop.train(run_config())
    assert [s for s, _, _ in steps.seen] == [*range(19), *range(10, STEPS)]


@pytest.mark.slow
def test_encoders_that_were_dropped_are_not_gone_back_to(run_config, record):
    """Alignment ends at 16, after the last checkpoint; before, going back is fine."""
    aligned = {"enc_type": "digits-vit", "align_until": 16, "max_train_steps": 20}
    steps = record(poisoned=[17])
    loop.train(run_config(**aligned))
    assert steps.state.history.rollbacks == 0
    steps = record(poisoned=[13])
    loop.train(run_config(**aligned, exp_name="before"))
    assert [s for s, _, _ in steps.seen] == [*range(15), *range(10, 20)]
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


@pytest.mark.slow
def test_qk_norm_trains_samples_and_resumes(run_config, record):
    sampling = {"sampling_steps": 8, "num_steps": 2, "cfg_scale": 1.0}
    whole = record()
    run = loop.train(run_config(qk_norm=True, max_train_steps=8, exp_name="whole", **sampling))
    assert (run / "samples.png").stat().st_size > 1000
    record(stop_after=6)
    with pytest.raises(KeyboardInterrupt):
        loop.train(run_config(qk_norm=True, max_train_steps=8))
    rest = record()
    loop.train(run_config(qk_norm=True, max_train_steps=8, resume="auto"))
    assert_same(rest.state, whole.state)
    weight = rest.state.model.state_dict()["blocks.0.attn.q_norm.weight"]
    assert not torch.equal(weight, torch.ones_like(weight))
