"""Training from columns of features, without images and encoders."""

import dataclasses
import shutil
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("lance")

from repa_fast import encoders
from repa_fast.data import dataset as dataset_module
from repa_fast.data.dataset import LatentDataset
from repa_fast.data.digits import digits_metadata
from repa_fast.data.loader import read_batch
from repa_fast.prepare.features import Extraction, FeaturesConfig, prepare_features
from repa_fast.train import step
from repa_fast.train.report import read_metrics
from repa_fast.train.state import build_state
from tests.refusals import refused
from tests.train.conftest import ALONE, trained

pytestmark = pytest.mark.xdist_group("train features")  # what its tests share is made once


@pytest.fixture(scope="module")
def data_dir(few_digits, tmp_path_factory):
    """Some digits with their features as fp16 and int8, and a column that says another encoder."""
    out = shutil.copytree(few_digits, tmp_path_factory.mktemp("data") / "digits")
    for name, storage in (("digits_vit", "fp16"), ("small", "int8")):
        options = {"enc_type": "digits-vit", "column": name, "storage": storage}
        config = FeaturesConfig(data_dir=str(out), **options)
        said = prepare_features(config)
        assert f"200 rows of {name}" in said and "kB per image" in said
        assert "all as they were" in prepare_features(dataclasses.replace(config, verify=True))
    table = LatentDataset(out)
    other = dataclasses.replace(table.features["small"], name="other", encoder="mae-vit-l")
    Extraction(table, other, lambda images: torch.zeros(len(images), 16, 96), 256).run()
    return str(out)


@pytest.fixture(scope="module")
def metrics(data_dir, tmp_path_factory):
    """(config overrides) -> metrics of each step of a run."""

    def of_run(**overrides):
        run = trained(data_dir, tmp_path_factory.mktemp("runs") / "run", **overrides)
        return read_metrics(run / "metrics.jsonl")

    return of_run


@pytest.fixture(scope="module")
def online(metrics):
    return metrics()


@pytest.mark.parametrize("column, bound", [("digits_vit", 2**-11), ("small", 1 / 127)])
def test_the_run_is_the_online_one_up_to_the_rounding_of_the_features(
    metrics, online, column, bound, monkeypatch
):
    never = mock.Mock(side_effect=AssertionError("no image and no encoder is needed"))
    monkeypatch.setattr(dataset_module, "decode", never)
    monkeypatch.setattr(encoders, "load", never)
    cached = metrics(features=column)
    for theirs, ours in zip(online, cached, strict=True):
        assert ours["align/digits-vit"] == pytest.approx(theirs["align/digits-vit"], abs=bound)
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=bound)
        assert ours["denoise"] == pytest.approx(theirs["denoise"], rel=1e-4)


@pytest.mark.parametrize("column, cosine", [("digits_vit", 1 - 1e-6), ("small", 1 - 1e-3)])
def test_targets_are_the_encoder_s_own(data_dir, column, cosine):
    table = LatentDataset(data_dir)
    batch = read_batch(table, np.arange(40), features=[column])
    with torch.no_grad():
        expected = encoders.load("digits-vit", 16, "cpu")(batch["image"])
    got = table.features[column].unpack(batch)
    assert torch.nn.functional.cosine_similarity(got.float(), expected, dim=-1).min() > cosine


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"features": "nothing"}, "features is 'nothing', expected one of the dataset's columns: "),
        ({"features": "other"}, "column other holds 16 tokens of width 96 by mae-vit-l from 16"),
        ({"features": "digits_vit,small"}, "features has 2 columns"),
        ({"features": "digits_vit", "enc_type": "none"}, "features has 1 columns"),
    ],
)
def test_columns_that_do_not_fit_are_refused(metrics, overrides, words):
    refused(lambda: metrics(**overrides), words)


def test_an_official_folder_has_no_columns(config):
    run = config(features="digits_vit")
    words = "columns: none; `repa-fast prepare features`"
    refused(lambda: build_state(run, digits_metadata(), ALONE), words)


def test_a_made_up_batch_has_the_columns(config, data_dir):
    table = LatentDataset(data_dir)
    state = build_state(config(features="small"), table.metadata, ALONE, table.features)
    batch, draws = step.synthetic_batch(state, 3)
    denoise, align = step.losses(state, state.model, batch, draws)
    assert denoise.shape == (3,) and [part.shape for part in align] == [(3,)]
