"""Training from columns of features, without images and encoders."""

import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("lance")

from repa_fast import encoders
from repa_fast.data import dataset as dataset_module
from repa_fast.data.dataset import LatentDataset
from repa_fast.data.digits import prepare_digits
from repa_fast.data.loader import read_batch
from repa_fast.prepare.features import Extraction, FeaturesConfig, prepare_features
from repa_fast.train import run as runs
from repa_fast.train import step
from repa_fast.train.report import read_metrics
from repa_fast.train.state import build_state


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """The digits with their features as fp16 and int8, and one column that says another encoder."""
    out = prepare_digits(tmp_path_factory.mktemp("data") / "digits")
    for name, storage in (("digits_vit", "fp16"), ("small", "int8")):
        config = FeaturesConfig(
            data_dir=str(out), enc_type="digits-vit", column=name, storage=storage
        )
        said = prepare_features(config)
        assert f"1500 rows of {name}" in said and "kB per image" in said
        assert "all as they were" in prepare_features(dataclasses.replace(config, verify=True))
    table = LatentDataset(out)
    other = dataclasses.replace(table.features["small"], name="other", encoder="mae-vit-l")
    Extraction(table, other, lambda images: torch.zeros(len(images), 16, 96), 256).run()
    return str(out)


@pytest.fixture
def run(config, data_dir, tmp_path):
    def metrics(**overrides):
        values = {"data_dir": data_dir, "output_dir": str(tmp_path), "log_every": 1}
        name = overrides.get("features", "online") or "online"
        values |= {"exp_name": name, "max_train_steps": 4}
        return read_metrics(runs.train(config(**values | overrides)) / "metrics.jsonl")

    return metrics


@pytest.mark.parametrize("column", ["digits_vit", "small"])
def test_the_run_is_the_online_one_up_to_the_rounding_of_the_features(run, column, monkeypatch):
    online = run()

    def never(*arguments, **options):
        raise AssertionError("no image and no encoder is needed")

    monkeypatch.setattr(dataset_module, "decode", never)
    monkeypatch.setattr(encoders, "load", never)
    cached = run(features=column)
    bound = {"digits_vit": 2**-11, "small": 1 / 127}[column]
    for theirs, ours in zip(online, cached, strict=True):
        assert ours["align/digits-vit"] == pytest.approx(theirs["align/digits-vit"], abs=bound)
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=bound)
        assert ours["denoise"] == pytest.approx(theirs["denoise"], rel=1e-4)


@pytest.mark.parametrize("column", ["digits_vit", "small"])
def test_targets_are_the_encoder_s_own(data_dir, column):
    table = LatentDataset(data_dir)
    batch = read_batch(table, np.arange(40), features=[column])
    with torch.no_grad():
        expected = encoders.load("digits-vit", 16, "cpu")(batch["image"])
    got = table.features[column].unpack(batch)
    cosine = torch.nn.functional.cosine_similarity(got.float(), expected, dim=-1)
    assert cosine.min() > {"digits_vit": 1 - 1e-6, "small": 1 - 1e-3}[column]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"features": "nothing"}, "features is 'nothing', expected one of the dataset's columns: "),
        ({"features": "other"}, "column other holds 16 tokens of width 96 by mae-vit-l from 16"),
        ({"features": "digits_vit,small"}, "features has 2 columns"),
        ({"features": "digits_vit", "enc_type": "none"}, "features has 1 columns"),
    ],
)
def test_columns_that_do_not_fit_are_refused(run, overrides, message):
    with pytest.raises(ValueError, match=message):
        run(**overrides)


def test_an_official_folder_has_no_columns(config, data_dir):
    from repa_fast.data.digits import digits_metadata
    from repa_fast.distributed import World

    world = World(rank=0, size=1, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="columns: none; `repa-fast prepare features`"):
        build_state(config(features="digits_vit"), digits_metadata(), world)


def test_a_made_up_batch_has_the_columns(config, data_dir):
    from repa_fast.distributed import World

    table = LatentDataset(data_dir)
    world = World(rank=0, size=1, device=torch.device("cpu"))
    state = build_state(config(features="small"), table.metadata, world, table.features)
    batch, draws = step.synthetic_batch(state, 3)
    denoise, align = step.losses(state, state.model, batch, draws)
    assert denoise.shape == (3,) and [part.shape for part in align] == [(3,)]
