"""The judges of a run on the digits: they know real digits, noise and copies apart."""

import json
import re
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from repa_fast.configs import presets
from repa_fast.data.digits import digits_metadata
from repa_fast.distributed import World
from repa_fast.eval import digits
from repa_fast.eval.load import load
from repa_fast.train import checkpoint
from repa_fast.train.state import build_state
from tests.refusals import refused


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run at step 7 whose EMA has learnt nothing: its velocity is zero, so samples are noise."""
    config = replace(presets.get("digits"), hidden_size=32, depth=3, num_steps=2, cfg_scale=1.0)
    state = build_state(config, digits_metadata(), World(0, 1, torch.device("cpu")))
    state.step = 7
    with torch.no_grad():
        for parameter in state.ema.parameters():  # unlike the trained weights, and new ones
            parameter.mul_(2)
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder / "checkpoints", state)
    return folder


def test_grey_is_the_mean_of_the_channels_in_the_unit_interval():
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)
    grey = digits.grey(images)
    assert grey.shape == (3, 256) and grey.dtype == np.float64
    total = images[:, 0].astype(float) + images[:, 1] + images[:, 2]
    assert np.allclose(grey, (total / (3 * 255)).reshape(3, 256), rtol=1e-14)
    assert digits.grey(np.full((1, 3, 4, 4), 255, np.uint8)).max() == 1


def test_the_neighbour_is_the_nearest_in_rms_per_pixel_and_a_copy_s_at_no_distance():
    generator = np.random.default_rng(0)
    queries, references = generator.random((7, 30)), generator.random((11, 30))
    rms = np.sqrt(((queries[:, None] - references[None]) ** 2).mean(-1))
    got = digits.nearest_neighbour(queries, references)
    assert got == pytest.approx(rms.min(1).mean(), rel=1e-9)
    assert digits.nearest_neighbour(references[[5, 9, 3]], references) < 1e-6


def test_a_stopped_run_is_evaluated_only_by_the_step_that_is_named_and_as_what_it_learnt(
    run, monkeypatch, tmp_path
):
    whole = shutil.copytree(run, tmp_path / "run")
    argv = ["digits", str(whole), "--samples", "100"]
    monkeypatch.setattr("sys.argv", argv)
    said = refused(digits.main, r"run was stopped at step 7 of 1600", "make demo", "--step 7")
    assert said.count("--resume auto") == 1 and not (whole / "scores.json").exists()
    monkeypatch.setattr("sys.argv", [*argv, "--step", "7"])
    text = digits.main()
    scores = digits.Scores(**json.loads((whole / "scores.json").read_text()))
    assert {type(value) for value in asdict(scores).values()} == {int, float, str}
    assert (scores.step, scores.weights, scores.samples) == (7, "ema", 100)
    assert scores.classifier_accuracy >= 0.97  # of held-out digits
    assert scores.class_accuracy < 0.3
    assert scores.frechet_distance > 10 * scores.frechet_distance_held_out > 0
    assert scores.nearest_neighbour > 2 * scores.nearest_neighbour_held_out > 0
    assert -0.5 < scores.alignment_cosine < 0.5
    assert text == digits.describe(scores)
    assert "samples of the weights model at step 7" in digits.describe(
        replace(scores, weights="model")
    )
    better = digits.describe(replace(scores, class_accuracy=0.9876, alignment_cosine=0.123))
    assert re.search(r"class accuracy: 98\.8 % of 100 samples at step 7", better)
    assert f"{100 * scores.classifier_accuracy:.1f} %" in better
    assert f"{scores.frechet_distance:.2f}" in better and "0.123" in better
    assert f"{scores.nearest_neighbour:.4f}" in better and "alignment" in better
    assert "alignment" not in digits.describe(replace(scores, alignment_cosine=None))


def test_other_weights_are_evaluated_where_they_are_there(run, monkeypatch):
    _, model, _ = digits.load_run(run, weights="model")
    expected = load(run, weights="model").model.state_dict()
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    other = ["--step", "7", "--weights", "ema_2"]
    refused(
        lambda: digits.main([str(run), *other]), "0000007 has no weights ema_2, expected one of"
    )
    known = digits.Scores(7, "model", 10, *[0.5] * 7)
    monkeypatch.setattr(digits, "evaluate", lambda *_, **__: known)
    digits.main([str(run), "--step", "7", "--weights", "model"])
    assert json.loads((run / "scores-model.json").read_text())["weights"] == "model"
    assert not (run / "scores.json").exists()


def test_samples_are_the_ema_s_ask_for_each_class_alike_and_repeat_with_the_seed(run):
    config, model, step = digits.load_run(run)
    assert step == 7 and config.hidden_size == 32 and not model.training
    expected = load(run).model.state_dict()
    assert not expected["final_layer.linear.weight"].any() and expected["pos_embed"].any()
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    pixels, labels = digits.generate(config, model, 20, seed=1)
    assert pixels.shape == (20, 3, 16, 16) and pixels.dtype == np.uint8
    assert np.bincount(labels).tolist() == [2] * 10
    assert np.array_equal(digits.generate(config, model, 20, seed=1)[0], pixels)
    assert not np.array_equal(digits.generate(config, model, 20, seed=2)[0], pixels)


def test_a_run_without_an_encoder_has_no_alignment(run):
    config, model, _ = digits.load_run(run)
    assert digits.alignment_cosine(replace(config, enc_type="none"), model, 0) is None


def test_a_missing_checkpoint_is_named(run, tmp_path):
    refused(lambda: digits.load_run(run, 8), r"\[7\], expected 8")
    refused(lambda: digits.load_run(tmp_path), "expected at least one")
