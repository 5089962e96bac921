import sys
import time

import numpy as np
import pytest

from repa_fast.train.report import TensorBoard, WeightsAndBiases, open_tracker


def test_the_flag_chooses_the_tracker(config, tmp_path):
    assert open_tracker(config(report_to="none"), tmp_path, 0) is None
    tracker = open_tracker(config(report_to="tensorboard"), tmp_path, 0)
    tracker.close()
    assert isinstance(tracker, TensorBoard)


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
    while not (written := all(b"loss" in record.read_bytes() for record in records)):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert written


def test_missing_wandb_is_a_clear_error(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"report_to is wandb.*pip install wandb"):
        WeightsAndBiases(config(), tmp_path)
