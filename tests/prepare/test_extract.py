"""What an extraction of features writes; how it is cut off and goes on is in test_resuming.py."""

import numpy as np
import pytest
import torch

from repa_fast.data.dataset import LatentDataset
from repa_fast.data.loader import Loader
from repa_fast.data.order import SampleOrder
from repa_fast.prepare import features as extract
from tests.prepare.extracting import begin, column, encode, pixels_of, run, stored
from tests.refusals import refused


def expected(rows=45):
    padded = np.resize(pixels_of(rows).transpose(0, 3, 1, 2), (rows + -rows % 4, 3, 8, 8))
    return torch.cat([encode(images) for images in np.split(padded, len(padded) // 4)])[:rows]


@pytest.fixture
def table(tmp_path):
    begin(tmp_path)
    return tmp_path


def test_the_column_holds_each_image_s_features(table):
    before = LatentDataset(table)
    rows = before.rows(np.arange(45))
    refused(lambda: stored(table), "no column of features 'made_up', expected one of: none")
    assert run(table)
    assert torch.equal(stored(table), expected().half())
    after = LatentDataset(table)
    assert after.features == {"made_up": column()} and before.features == {}
    assert after.metadata == before.metadata
    for dataset in (before, after):
        np.testing.assert_equal(dataset.rows(np.arange(45)), rows)


def test_a_second_column_and_one_that_was_dropped(table):
    run(table)
    run(table, name="small", storage="int8")
    LatentDataset(table).table.drop_columns(["made_up"])
    refused(lambda: stored(table), "no column of features 'made_up', expected one of: small")
    run(table, name="again")
    level = expected().abs().amax(-1, keepdim=True) / 127
    assert ((stored(table, "small") - expected()).abs() <= level * 0.501).all()
    assert torch.equal(stored(table, "again"), expected().half())


def test_a_table_that_was_changed_meanwhile_is_left_alone(table, monkeypatch):
    work = extract.Extraction(LatentDataset(table), column(), encode, 4)
    commit = extract.Extraction.commit

    def after_a_change(*arguments):
        LatentDataset(table).table.delete("label = 1")
        return commit(*arguments)

    monkeypatch.setattr(extract.Extraction, "commit", after_a_change)
    refused(work.run, "changed while the features were computed", error=RuntimeError)
    assert LatentDataset(table).features == {} and len(LatentDataset(table)) == 23


def test_bad_names_features_and_images_are_named_and_nothing_is_changed(tmp_path):
    begin(tmp_path, bad=(17,))
    for name in ("index", "image", "made-up", "", "2d"):
        refused(lambda name=name: run(tmp_path, name=name), "column is")
    dataset = LatentDataset(tmp_path)
    work = extract.Extraction(dataset, column(), lambda x: encode(x) * 1e6, 4)
    refused(work.run, "made-up: features reach")
    refused(lambda: run(tmp_path), "row 17: ")
    assert LatentDataset(tmp_path).features == {}


def test_the_loader_carries_the_column(table):
    run(table, storage="int8")
    dataset = LatentDataset(table)
    order = SampleOrder(45, 10, 0)
    whole = stored(table)
    with Loader(dataset, order, start=0, stop=8, images=False, features=["made_up"]) as loader:
        for step, batch in enumerate(loader):
            assert "image" not in batch
            assert torch.equal(dataset.features["made_up"].unpack(batch), whole[order.rows(step)])
    assert step == 7
    other = Loader(dataset, order, start=0, stop=1, features=["other"])
    refused(lambda: list(other), "no column of features 'other', expected one of: made_up")
