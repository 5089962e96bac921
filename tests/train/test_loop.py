"""train() in this process."""

import json
import os
import shutil
import signal

import pytest

pytest.importorskip("lance")

from repa_fast.checkpoint import layout as weights
from repa_fast.configs.build import build_model
from repa_fast.data.digits import digits_metadata
from repa_fast.train import checkpoint, graph
from repa_fast.train.report import read_metrics
from repa_fast.train.spikes import TrainingDiverged
from tests.refusals import refused
from tests.train.conftest import tiny_config, trained

pytestmark = pytest.mark.xdist_group("train loop")  # what its tests share is made once

SIX_STEPS = {"max_train_steps": 6, "log_every": 2, "checkpointing_steps": 4, "warmup_steps": 8}


@pytest.fixture(scope="module")
def finished(digits_dir, tmp_path_factory):
    """A run to its end, with two grids of samples and a tracker."""
    options = SIX_STEPS | {"sampling_steps": 3, "num_steps": 2, "report_to": "tensorboard"}
    run = tmp_path_factory.mktemp("runs") / "run"
    return trained(digits_dir, run, **options, plotted=True)


def logged_steps(run):
    return [line["step"] for line in read_metrics(run / "metrics.jsonl")]


def test_a_run_leaves_what_it_promises(finished):
    assert checkpoint.steps(finished / "checkpoints") == [4, 6]
    assert logged_steps(finished) == [2, 4, 6]
    grids = finished / "samples"
    assert sorted(path.name for path in grids.iterdir()) == ["0000003.png", "0000006.png"]
    assert (finished / "samples.png").read_bytes() == (grids / "0000006.png").read_bytes()
    assert (finished / "loss.png").stat().st_size > 1000
    assert list((finished / "logs").glob("events.out.tfevents.*"))
    assert json.loads((finished / "args.json").read_text())["depth"] == 3
    lines = read_metrics(finished / "metrics.jsonl")
    last = lines[-1]
    assert {"loss", "denoise", "align/digits-vit", "grad_norm", "skipped", "loss_by_t",
            "images_per_second", "mfu"} <= last.keys()  # fmt: skip
    rates = [line["learning_rate"] for line in lines]
    assert rates == [tiny_config().learning_rate * step / 8 for step in (2, 4, 6)], "of a warm-up"


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({}, r"newest: 0000006.*--resume auto"),
        ({"resume_step": 5}, r"no complete checkpoint of step 5.*found: 0000006, 0000004"),
        ({"resume_step": 4}, r"up to step 6, later than .*0000004: .*--exp-name NEW"),
    ],
)
def test_existing_checkpoints_are_neither_overwritten_nor_passed_over_unasked(
    digits_dir, finished, overrides, words
):
    refused(lambda: trained(digits_dir, finished, **SIX_STEPS | overrides), words)
    assert checkpoint.steps(finished / "checkpoints") == [4, 6]


def test_a_new_run_goes_on_from_an_older_step(train, finished):
    older = str(finished / "checkpoints" / "0000004")
    assert checkpoint.steps(train("other", resume=older) / "checkpoints") == [5]


def test_resume_continues_a_finished_run_to_more_steps(train, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    run = train(**SIX_STEPS | {"max_train_steps": 8}, resume="auto")
    assert logged_steps(run) == [2, 4, 6, 8]


def test_epochs_bound_the_run(train):
    run = train(enc_type="none", batch_size=750, micro_batch=250, epochs=1, max_train_steps=100)
    assert checkpoint.steps(run / "checkpoints") == [2]


def test_signal_writes_a_checkpoint_and_returns(train, monkeypatch):
    step = graph.train_step

    def interrupted(state, batch):
        step(state, batch)
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(graph, "train_step", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    run = train(**SIX_STEPS, plotted=True)
    assert checkpoint.steps(run / "checkpoints") == [3]
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (run / "loss.png").exists()


def test_persistent_nan_stops_with_a_checkpoint(train, tmp_path):
    """The first step throws the weights so far that all later ones overflow."""
    options = {"learning_rate": 1e30, "max_bad_steps": 4, "max_train_steps": 50}
    with pytest.raises(TrainingDiverged, match=r"5 consecutive steps up to step 6 "):
        train(**SIX_STEPS | options)
    folder = tmp_path / "run" / "checkpoints"
    assert checkpoint.steps(folder)[-1] == 6
    reading = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert reading["skipped"] == 2 and reading["loss"] is None
    average = build_model(tiny_config(), digits_metadata())
    weights.load_weights(checkpoint.path_of(folder, 6), average)
    assert all(parameter.isfinite().all() for parameter in average.parameters())


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"resolution": 32, "enc_type": "none"}, "resolution is 32, expected 16"),
        ({"num_classes": 5}, "num_classes is 5, expected at least 10"),
        ({"data_dir": "nowhere"}, "no dataset at nowhere"),
    ],
)
def test_dataset_and_config_must_fit(train, overrides, words):
    refused(lambda: train(**overrides), words)
