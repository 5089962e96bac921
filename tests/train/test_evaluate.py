"""--eval-every."""

import dataclasses
import json
import shutil
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("lance")
pytest.importorskip("timm")

from repa_fast import ops
from repa_fast.configs.sampler import SamplerConfig
from repa_fast.data.digits import digit_images
from repa_fast.encoders.digits import DigitsJudge
from repa_fast.eval import fitted
from repa_fast.eval.load import load
from repa_fast.eval.sampling import ImageSampler
from repa_fast.eval.scores import frechet_distance, statistics
from repa_fast.kernels.attention import current_backend
from repa_fast.train.evaluate import Evaluator, sample_grid
from tests.refusals import refused
from tests.train.conftest import trained

pytestmark = pytest.mark.xdist_group("train evaluate")  # what its tests share is made once

SAMPLES = 195  # enough for a distance in 96 features, in more than one batch
SAMPLER = {"num_steps": 2, "cfg_scale": 1.5}
OPTIONS = SAMPLER | {"learning_rate": 1e-2, "log_every": 50, "checkpointing_steps": 2}
OPTIONS |= {"eval_every": 2, "eval_samples": SAMPLES, "eval_features": "digits-judge"}


@pytest.fixture(scope="module")
def options(few_digits):
    return OPTIONS | {"data_dir": few_digits}


@pytest.fixture(scope="module")
def watched(few_digits, options, tmp_path_factory):
    return trained(few_digits, tmp_path_factory.mktemp("runs") / "watched", **options)


def evaluations(run):
    return [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]


def test_the_distance_is_that_of_samples_of_the_checkpoint(watched):
    found = evaluations(watched)
    assert [line["step"] for line in found] == [2, 4, 5]
    loaded = load(watched / "checkpoints" / "0000004")
    sampler = ImageSampler(loaded, SamplerConfig(**SAMPLER), torch.device("cpu"))
    batches = np.arange(256).reshape(4, 64)  # as there, then cut
    images = torch.cat([sampler.images(index, index % 10, 0) for index in batches])[:SAMPLES]
    judge, real = DigitsJudge(), digit_images("train")[0][:200].transpose(0, 3, 1, 2).copy()
    moments = [
        statistics(judge.features(pixels).numpy()) for pixels in (torch.from_numpy(real), images)
    ]
    distance = frechet_distance(*moments[1], *moments[0])
    assert found[1]["Frechet distance"] == pytest.approx(distance, rel=1e-5)
    asked = torch.arange(SAMPLES) % 10
    right = (judge(images).argmax(1) == asked).double().mean().item()
    assert found[1]["class accuracy"] == pytest.approx(right)
    assert found[0]["Frechet distance"] != found[1]["Frechet distance"]
    assert "evaluation at step 4  Frechet distance" in (watched / "log.txt").read_text()


def test_training_is_the_same_with_it(train, options, watched):
    plain = train("plain", **options | {"eval_every": 0})
    assert not (plain / "evals.jsonl").exists()
    assert load(watched).digest == load(plain).digest


@pytest.mark.parametrize("classes, rows, columns", [
    (1, 10, 10), (2, 10, 10), (3, 11, 9), (4, 8, 12), (10, 10, 10), (1000, 10, 10),
])  # fmt: skip
def test_a_grid_is_nearly_square_and_a_class_has_neighbouring_columns(
    make_state, monkeypatch, classes, rows, columns
):
    state = make_state(**SAMPLER)
    names = tuple(map(str, range(classes)))
    state.metadata = dataclasses.replace(state.metadata, class_names=names)
    asked = []

    def by_label(objective, model, noise, labels, *_, **__):
        asked.append(labels.view(rows, columns).tolist())
        return noise

    monkeypatch.setattr(type(state.objective), "sample", by_label)
    shown = sample_grid(state, state.ema)
    assert shown.shape == (rows * 52 - 4, columns * 52 - 4, 3)
    if classes > 10:
        assert [label for row in asked[0] for label in row] == list(range(0, 1000, 10))
    else:
        each = columns // classes
        assert asked[0] == [[label for label in range(classes) for _ in range(each)]] * rows


def test_a_resumed_run_s_evaluations_read_as_if_it_had_not_been_cut(
    train, options, watched, tmp_path
):
    """One that was killed after step 2 and had got to the end before."""
    shutil.copytree(watched, tmp_path / "run")
    for step in (4, 5):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"{step:07d}")
    assert evaluations(train(**options, resume="auto")) == evaluations(watched)


def test_features_that_are_not_known_stop_the_run_before_it_begins(train, tmp_path):
    refused(lambda: train(**OPTIONS | {"eval_features": "other"}), "'other', expected one of")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_features_fitted_on_the_run_s_own_rows_judge_its_samples(make_state, options, capsys):
    """A distance of too few samples is left out, which is said at once."""
    fitted_here = options | {"eval_features": "fitted", "eval_samples": 60}
    with mock.patch.object(fitted, "STEPS", 3):
        evaluator = Evaluator(make_state(**fitted_here))
        why = "60 images, expected at least 64 (twice the width 32); raise --eval-samples"
        assert why in capsys.readouterr().err
        found = evaluator(make_state(**fitted_here))
    assert "Frechet distance" not in found and 0 <= found["class accuracy"] <= 1
    assert found["precision"] >= 0


def test_fitted_features_need_a_dataset_to_compare_with(make_state, options, tmp_path):
    np.savez(tmp_path / "real.npz", arr_0=np.zeros((8, 16, 16, 3), np.uint8))
    of = options | {"eval_features": "fitted", "eval_reference": str(tmp_path / "real.npz")}
    refused(lambda: Evaluator(make_state(**of)), "fitted, expected a dataset to fit on")


def test_an_fp16_run_is_sampled_in_fp32_whatever_backend_its_attention_has(make_state, options):
    """sdpa-cudnn takes no fp32, and nothing on a CPU."""
    state = make_state(**options | {"eval_samples": 8, "mixed_precision": "no"})
    ops.set_attention_backend("sdpa-cudnn")
    try:
        assert Evaluator(state)(state)
        assert current_backend() == "sdpa-cudnn"
    finally:
        ops.set_attention_backend("sdpa")
