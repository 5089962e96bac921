"""train() in this process."""

import json
import os
import signal

import pytest

pytest.importorskip("lance")

from repa_fast.checkpoint import layout as weights
from repa_fast.configs.build import build_model
from repa_fast.data.digits import digits_metadata, prepare_digits
from repa_fast.train import checkpoint, graph
from repa_fast.train import run as runs
from repa_fast.train.report import read_metrics
from repa_fast.train.spikes import TrainingDiverged


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    return str(prepare_digits(tmp_path_factory.mktemp("data") / "digits"))


@pytest.fixture
def run_config(config, digits_dir, tmp_path):
    def make(**overrides):
        values = {
            "data_dir": digits_dir,
            "output_dir": str(tmp_path),
            "exp_name": "run",
            "max_train_steps": 6,
            "log_every": 2,
            "checkpointing_steps": 4,
        }
        return config(**{**values, **overrides})

    return make


def test_a_run_leaves_what_it_promises(run_config, tmp_path):
    run = runs.train(run_config(sampling_steps=3, num_steps=2, report_to="tensorboard"))
    assert run == tmp_path / "run"
    assert checkpoint.steps(run / "checkpoints") == [4, 6]
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [2, 4, 6]
    assert sorted(path.name for path in (run / "samples").iterdir()) == [
        "0000003.png",
        "0000006.png",
    ]
    assert (run / "samples.png").read_bytes() == (run / "samples" / "0000006.png").read_bytes()
    assert (run / "loss.png").stat().st_size > 1000
    assert list((run / "logs").glob("events.out.tfevents.*"))
    assert json.loads((run / "args.json").read_text())["depth"] == 3
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert {"loss", "denoise", "align/digits-vit", "grad_norm", "skipped", "loss_by_t",
            "images_per_second", "mfu"} <= last.keys()  # fmt: skip


def test_existing_checkpoints_are_not_overwritten_unasked(run_config):
    runs.train(run_config())
    with pytest.raises(ValueError, match=r"newest: 0000006.*--resume auto"):
        runs.train(run_config())
    with pytest.raises(
        ValueError, match=r"no complete checkpoint of step 5.*found: 0000006, 0000004"
    ):
        runs.train(run_config(resume_step=5))


def test_resume_continues_a_finished_run_to_more_steps(run_config):
    run = runs.train(run_config())
    runs.train(run_config(max_train_steps=8, resume="auto"))
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [2, 4, 6, 8]


def test_epochs_bound_the_run(run_config):
    run = runs.train(run_config(batch_size=750, micro_batch=50, epochs=1, max_train_steps=100))
    assert checkpoint.steps(run / "checkpoints") == [2]


def test_signal_writes_a_checkpoint_and_returns(run_config, monkeypatch):
    step = graph.train_step

    def interrupted(state, batch):
        step(state, batch)
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(graph, "train_step", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    run = runs.train(run_config())
    assert checkpoint.steps(run / "checkpoints") == [3]
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (run / "loss.png").exists()


def test_persistent_nan_stops_with_a_checkpoint(run_config, tmp_path):
    """The first step throws the weights so far that all later ones overflow."""
    config = run_config(learning_rate=1e30, max_bad_steps=4, max_train_steps=50)
    with pytest.raises(TrainingDiverged, match=r"5 consecutive steps up to step 6 "):
        runs.train(config)
    folder = tmp_path / "run" / "checkpoints"
    assert checkpoint.steps(folder)[-1] == 6
    reading = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert reading["skipped"] == 2 and reading["loss"] is None
    state = build_model(config, digits_metadata())
    weights.load_ema(checkpoint.path_of(folder, 6), state)
    assert all(parameter.isfinite().all() for parameter in state.parameters())


def test_dataset_and_config_must_fit(run_config):
    with pytest.raises(ValueError, match="resolution is 32, expected 16"):
        runs.train(run_config(resolution=32, enc_type="none"))
    with pytest.raises(ValueError, match="num_classes is 5, expected at least 10"):
        runs.train(run_config(num_classes=5))
    with pytest.raises(ValueError, match="no dataset at nowhere"):
        runs.train(run_config(data_dir="nowhere"))


def test_an_older_step_is_not_gone_on_from_beside_newer_ones(run_config, tmp_path):
    run = runs.train(run_config(max_train_steps=4, checkpointing_steps=2, sampling_steps=0))
    with pytest.raises(ValueError, match=r"up to step 4, later than .*0000002: .*--exp-name NEW"):
        runs.train(run_config(max_train_steps=6, resume_step=2, sampling_steps=0))
    assert weights.steps(run / "checkpoints") == [2, 4]
    older = str(run / "checkpoints" / "0000002")
    other = runs.train(
        run_config(exp_name="other", max_train_steps=3, resume=older, sampling_steps=0)
    )
    assert weights.steps(other / "checkpoints") == [3]
