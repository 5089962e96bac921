"""A folder in use, evaluations that fail, outputs that nobody takes: what a run does then."""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lance")
pytest.importorskip("timm")

from repa_fast.checkpoint.layout import steps
from repa_fast.configs.config import TrainConfig
from repa_fast.data.latents import VAE
from repa_fast.failure import Failure
from repa_fast.lock import NAME, hold
from repa_fast.train import evaluate, outputs, report
from repa_fast.train.outputs import Attempts, Lines
from repa_fast.train.report import TensorBoard, read_metrics
from tests.refusals import refused
from tests.sealing import reseal

EVALUATED = {"max_train_steps": 4, "eval_every": 2, "eval_features": "digits-judge"}
EVALUATED |= {"eval_samples": 8, "num_steps": 2, "log_every": 2, "checkpointing_steps": 4}


def evaluations(run: Path) -> list[dict]:
    return read_metrics(run / "evals.jsonl")


def test_a_run_that_another_process_trains_is_left_alone(train, tmp_path):
    with hold(tmp_path / "run"):
        words = (r"run is in use by process \d+ on ", "expected no other process to write there")
        refused(lambda: train(enc_type="none"), *words)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [NAME]
    train(enc_type="none")
    assert not (tmp_path / "run" / NAME).exists()


def test_a_url_is_no_place_for_a_run():
    refused(lambda: TrainConfig(output_dir="s3://bucket/runs"), "output_dir is 's3://", "a path")


def test_letters_that_the_locale_lacks_are_refused_and_all_others_written(train, tmp_path):
    """Python reads them as surrogates, which no other program takes."""
    refused(lambda: TrainConfig(exp_name="l\udcc3\udca4ufer"), r"is 'l\\udcc3.*LC_ALL=C\.UTF-8")
    run = train("läufer", enc_type="none", report_to="tensorboard")
    assert "läufer" in (run / "log.txt").read_text("utf-8")


def images(path: Path, count: int) -> str:
    np.savez(path, arr_0=np.zeros((count, 16, 16, 3), np.uint8))
    return str(path)


def unreachable(*_):
    raise Failure("the autoencoder sd-vae-ft-mse is neither a folder nor can it be fetched")


@pytest.mark.parametrize("what", ["missing", "few", "samples", "autoencoder"])
def test_an_evaluation_that_cannot_be_is_refused_before_the_first_step(
    train, tmp_path, make_state, monkeypatch, what
):
    if what == "autoencoder":
        monkeypatch.setattr(VAE, "load", unreachable)
        state = make_state(**EVALUATED | {"enc_type": "none"})
        state.vae = VAE("sd-vae-ft-mse")
        with pytest.raises(Failure, match="neither a folder nor can it be fetched"):
            evaluate.Evaluator(state)
        return
    options, words = {
        "missing": ({"eval_reference": "no.npz"}, "no.npz"),
        "few": ({"eval_reference": images(tmp_path / "x.npz", 3)}, "reference: 3 images, .* 4"),
        "samples": ({"eval_samples": 2}, "--eval-samples: 2 images, expected at least 4"),
    }[what]
    refused(lambda: train(enc_type="none", **EVALUATED | options), words)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("error", [ValueError("too\nfew"), RuntimeError("out of memory")])
def test_one_that_fails_later_is_said_and_training_goes_on(train, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(evaluate.Evaluator, "__call__", fails)
    run = train(enc_type="none", **EVALUATED)
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    assert evaluations(run) == [{"step": step, "failed": said} for step in (2, 4)]
    assert f"warning: no evaluation at step 2: {said}" in (run / "log.txt").read_text()
    assert steps(run / "checkpoints") == [4]


def test_what_is_due_is_saved_first_and_made_up_for_after_a_kill(train, tmp_path, monkeypatch):
    """Killed while it evaluates the step that it has just saved."""

    def killed(self, state):
        raise KeyboardInterrupt

    options = EVALUATED | {"checkpointing_steps": 2, "sampling_steps": 2, "enc_type": "none"}
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.Evaluator, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            train(**options)
    run = tmp_path / "run"
    assert steps(run / "checkpoints") == [2] and not (run / "evals.jsonl").exists()
    (run / "samples" / "0000002.png").unlink()
    train(**options, resume="auto")
    assert [line["step"] for line in evaluations(run)] == [2, 4]
    assert all("precision" in line for line in evaluations(run))
    grids = sorted(path.name for path in (run / "samples").iterdir())
    assert grids == ["0000002.png", "0000004.png"]


class Refusing(Lines):
    """A log that no line can be written to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.refuses = path.name == "log.txt"

    def flush(self) -> None:
        if self.refuses and self._waiting:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().flush()


def test_a_log_that_takes_nothing_ends_no_run(train, capsys, monkeypatch):
    monkeypatch.setattr(report, "Lines", Refusing)
    run = train(enc_type="none", max_train_steps=4, log_every=1, checkpointing_steps=4)
    assert steps(run / "checkpoints") == [4]
    warnings = capsys.readouterr().err
    assert warnings.count("warning: ") == 1
    assert "log.txt could not be written ([Errno 28] No space left on device)" in warnings


def test_failures_are_counted_and_said_once_a_minute(monkeypatch, capsys):
    now, attempts = [100.0], Attempts()
    monkeypatch.setattr(outputs.time, "monotonic", lambda: now[0])
    for now[0] in (100.0, 110.0, 159.0, 161.0):
        with attempts.to_write("x"):
            raise OSError(errno.EIO, "Input/output error")
    with attempts.to_write("x"):
        pass
    with pytest.raises(KeyError), attempts.to_write("x"):
        raise KeyError
    said = capsys.readouterr().err.splitlines()
    assert attempts.failed == 4 and len(said) == 2
    assert "nor 3 outputs before; training goes on" in said[1]


class Disk:
    """Takes so many bytes."""

    def __init__(self, free: int) -> None:
        self.free, self.content = free, b""

    def write(self, data: bytes) -> int:
        if not self.free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = data[: self.free]
        self.content, self.free = self.content + taken, self.free - len(taken)
        return len(taken)


def test_lines_that_a_full_disk_refuses_are_written_when_there_is_space(tmp_path):
    lines = Lines(tmp_path / "x")
    lines._file.close()
    lines._file = disk = Disk(6)
    for text in ("abc", "défg", "hij"):
        with Attempts().to_write("x"):
            lines.add(text)
    assert disk.content == "abc\nd\u00e9".encode()[:6]
    disk.free = 99
    lines.flush()
    assert disk.content.decode() == "abc\ndéfg\nhij\n"


def test_a_tensorboard_writer_that_broke_is_replaced_a_minute_later(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    now, board = [100.0], TensorBoard(tmp_path, 0)
    monkeypatch.setattr(outputs.time, "monotonic", lambda: now[0])

    def broken(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    board.scalars(1, {"x": 1.0})
    board._writer.flush()
    board._writer.add_scalar = broken
    with pytest.raises(OSError, match="No space"):
        board.scalars(2, {"x": 2.0})
    board.scalars(3, {"x": 3.0})
    now[0] += 61
    board.scalars(4, {"x": 4.0})
    board.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert {event.step for event in events.Scalars("x")} >= {4}


def test_a_config_of_a_later_version_and_a_renamed_folder_are_named(train, tmp_path):
    run = train(enc_type="none", max_train_steps=2, checkpointing_steps=2)
    saved = run / "checkpoints" / "0000002"
    renamed = shutil.copytree(saved, run / "checkpoints" / "0000005")
    words = r"0000005 is of step 2, expected the step that it is named by"
    refused(lambda: train(enc_type="none", max_train_steps=9, resume="auto"), words)
    shutil.rmtree(renamed)
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"warp_drive": True}))
    reseal(saved)
    words = r"0000002: a saved config has warp_drive, which is unknown here"
    refused(lambda: train(enc_type="none", max_train_steps=9, resume="auto"), words)


@pytest.mark.parametrize(
    "name", ["lock", "log.txt", "metrics.jsonl", "checkpoints", "logs", "samples"]
)
def test_what_is_written_never_goes_through_a_link(train, tmp_path, name):
    """Of a run that somebody else made, it would lead anywhere."""
    theirs, run = tmp_path / "theirs", tmp_path / "run"
    run.mkdir()
    if name in ("checkpoints", "logs", "samples"):
        (theirs / "0000001").mkdir(parents=True)
        (theirs / "0000001" / "__0_0.distcp").write_text("x")
    else:
        theirs.write_text("mine")
    (run / name).symlink_to(theirs)
    before = sorted(theirs.rglob("*")) if theirs.is_dir() else theirs.read_text()
    with contextlib.suppress(ValueError, OSError):  # metrics are written anew, in its place
        train(enc_type="none", max_train_steps=2)
    assert before == (sorted(theirs.rglob("*")) if theirs.is_dir() else theirs.read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises((ValueError, OSError), match=name):
        train("other", enc_type="none", max_train_steps=2)
    assert not (tmp_path / "nowhere").exists()
