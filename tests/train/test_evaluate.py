"""--eval-every."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("lance")
pytest.importorskip("timm")

from repa_fast import ops
from repa_fast.configs.sampler import SamplerConfig
from repa_fast.data.digits import digit_images, prepare_digits
from repa_fast.encoders.digits import DigitsJudge
from repa_fast.eval.load import load
from repa_fast.eval.sampling import ImageSampler
from repa_fast.eval.scores import frechet_distance, statistics
from repa_fast.kernels.attention import current_backend
from repa_fast.train import run as runs
from repa_fast.train.evaluate import Evaluator

SAMPLES = 70  # more than a batch


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
            "max_train_steps": 5,
            "learning_rate": 1e-2,
            "checkpointing_steps": 2,
            "eval_every": 2,
            "eval_samples": SAMPLES,
            "eval_features": "digits-judge",
            "num_steps": 2,
            "cfg_scale": 1.5,
        }
        return config(**{**values, **overrides})

    return make


def evaluations(run):
    return [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]


def test_the_distance_is_that_of_samples_of_the_checkpoint(run_config):
    run = runs.train(run_config())
    found = evaluations(run)
    assert [line["step"] for line in found] == [2, 4, 5]
    sampler = ImageSampler(
        load(run / "checkpoints" / "0000004"),
        SamplerConfig(num_steps=2, cfg_scale=1.5),
        torch.device("cpu"),
    )
    images = torch.cat(
        [
            sampler.images(index, index % 10, 0)
            for index in (np.arange(64), np.arange(64, 128))  # batches as there, then cut
        ]
    )[:SAMPLES]
    judge, real = DigitsJudge(), digit_images("train")[0].transpose(0, 3, 1, 2).copy()
    moments = [
        statistics(judge.features(pixels).numpy()) for pixels in (torch.from_numpy(real), images)
    ]
    distance = frechet_distance(*moments[1], *moments[0])
    assert found[1]["Frechet distance"] == pytest.approx(distance, rel=1e-5)
    assert found[0]["Frechet distance"] != found[1]["Frechet distance"]
    assert "evaluation at step 4  Frechet distance" in (run / "log.txt").read_text()


def test_training_is_the_same_with_it(run_config):
    watched = runs.train(run_config())
    plain = runs.train(run_config(exp_name="plain", eval_every=0))
    assert not (plain / "evals.jsonl").exists()
    weights = [load(run / "checkpoints" / "0000005").digest for run in (watched, plain)]
    assert weights[0] == weights[1]


def test_a_resumed_run_s_evaluations_read_as_if_it_had_not_been_cut(run_config):
    runs.train(run_config(max_train_steps=3))
    run = runs.train(run_config(resume="auto"))
    assert [line["step"] for line in evaluations(run)] == [2, 3, 4, 5]


def test_features_that_are_not_known_stop_the_run_before_it_begins(run_config, tmp_path):
    with pytest.raises(ValueError, match="'other', expected one of"):
        runs.train(run_config(eval_features="other"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_fp16_run_is_sampled_in_fp32_whatever_backend_its_attention_has(run_config, make_state):
    """sdpa-cudnn takes no fp32, and nothing on a CPU."""
    config = run_config(eval_samples=8, mixed_precision="no")
    state = make_state()
    state.config = config
    ops.set_attention_backend("sdpa-cudnn")
    try:
        assert Evaluator(state)(state)
        assert current_backend() == "sdpa-cudnn"
    finally:
        ops.set_attention_backend("sdpa")
