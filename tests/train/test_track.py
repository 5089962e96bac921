"""Trackers: which one a flag opens, and what wandb keeps of a run."""

import sys
import time
from functools import partial
from unittest.mock import MagicMock, call

import numpy as np
import pytest

from repa_fast.train.report import TensorBoard, open_tracker
from tests.refusals import refused


def test_the_flag_chooses_the_tracker_and_missing_wandb_is_a_clear_error(
    config, tmp_path, monkeypatch
):
    assert open_tracker(config(report_to="none"), tmp_path, 0) is None
    tracker = open_tracker(config(report_to="tensorboard"), tmp_path, 0)
    tracker.close()
    assert isinstance(tracker, TensorBoard)
    monkeypatch.setitem(sys.modules, "wandb", None)
    missing = partial(open_tracker, config(report_to="wandb"), tmp_path, 0)
    refused(missing, "report_to is wandb.*pip install 'repa-fast")


def test_wandb_is_given_all_that_a_run_logs_under_one_id(config, tmp_path, monkeypatch):
    """With a stand-in for the package, which the next test has."""
    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for step in (1, 2):
        tracker = open_tracker(config(report_to="wandb", exp_name="x"), tmp_path, step - 1)
        tracker.scalars(step, {"loss": 0.5})
    tracker.image(2, "samples", np.zeros((4, 4, 3), np.uint8))
    first, second = wandb.init.call_args_list
    assert first == second and first.kwargs["id"] == (tmp_path / "wandb-id").read_text()
    assert (first.kwargs["resume"], first.kwargs["dir"]) == ("allow", tmp_path)
    logged = [call({"loss": 0.5}, step=1), call({"loss": 0.5}, step=2)]
    logged.append(call({"samples": wandb.Image.return_value}, step=2))
    assert wandb.init.return_value.log.call_args_list == logged


@pytest.mark.usefixtures("heavy")
def test_wandb_offline_keeps_a_run_and_its_id(config, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (1, 2):
        tracker = open_tracker(config(report_to="wandb", exp_name="x"), tmp_path, step - 1)
        tracker.scalars(step, {"loss": 0.5})
        tracker.image(step, "samples", np.zeros((4, 4, 3), np.uint8))
        tracker.close()
    stored = (tmp_path / "wandb-id").read_text()
    records = list((tmp_path / "wandb").glob(f"offline-run-*-{stored}/run-{stored}.wandb"))
    assert len(records) == 2
    deadline = time.monotonic() + 30  # a process of wandb's writes them
    while not all(b"loss" in record.read_bytes() for record in records):
        assert time.monotonic() < deadline
        time.sleep(0.1)
