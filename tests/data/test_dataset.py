"""The native table: what is written comes back, and what does not fit is refused by name."""

import numpy as np
import pytest

from repa_fast.data import dataset
from repa_fast.data.dataset import LatentDataset, Metadata

lance = pytest.importorskip("lance")
pa = pytest.importorskip("pyarrow")

METADATA = Metadata(
    resolution=32,
    latent_shape=(2, 4, 4),
    vae="some-vae",
    scale=0.18215,
    bias=-0.125,
    class_names=("ant", "bee", "cicada"),
)
COUNT = 23


def make_rows(count: int = COUNT, seed: int = 0) -> list[dataset.Row]:
    generator = np.random.default_rng(seed)
    return [
        {
            "image": generator.bytes(20 + 7 * index),
            "moments": generator.standard_normal(METADATA.moments_shape, dtype=np.float32),
            "label": index % 3,
        }
        for index in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("dataset")
    dataset.write(root / "train.lance", make_rows(), METADATA, batch_rows=5)
    dataset.write(root / "val.lance", make_rows(4, seed=1), METADATA)
    return root


def assert_equal_rows(got: dataset.Rows, indices: list[int], expected: list[dataset.Row]) -> None:
    assert got["index"].tolist() == indices and got["index"].dtype == np.int64
    assert got["image"] == [expected[index]["image"] for index in indices]
    assert got["moments"].dtype == np.float32
    assert np.array_equal(got["moments"], np.stack([expected[i]["moments"] for i in indices]))
    assert got["label"].dtype == np.int64
    assert got["label"].tolist() == [expected[index]["label"] for index in indices]


def test_moments_hold_mean_and_standard_deviation_of_each_channel():
    assert METADATA.moments_shape == (4, 4, 4)


@pytest.mark.parametrize(
    "indices",
    [
        list(range(COUNT)),
        list(reversed(range(COUNT))),
        [7],
        [22, 0, 11, 5, 4],
        [3, 3, 19, 3, 0, 0],
    ],
)
def test_rows_come_back_exactly_in_the_order_asked_for(folder, indices):
    table = LatentDataset(folder)
    assert_equal_rows(table.rows(np.array(indices)), indices, make_rows())


def test_metadata_comes_back(folder):
    table = LatentDataset(folder)
    assert table.metadata == METADATA
    assert len(table) == COUNT


@pytest.mark.parametrize("split, count, seed", [("train", COUNT, 0), ("val", 4, 1)])
def test_a_folder_resolves_to_its_split(folder, split, count, seed):
    table = LatentDataset(folder, split)
    assert len(table) == count and table.uri == str(folder / f"{split}.lance")
    assert_equal_rows(table.rows(np.array([2, 1])), [2, 1], make_rows(count, seed))


def test_a_table_can_be_named_itself(folder):
    assert len(LatentDataset(str(folder / "val.lance"))) == 4


def test_a_missing_split_is_refused(folder):
    with pytest.raises(ValueError, match="no dataset"):
        LatentDataset(folder, "test")


def test_a_missing_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no dataset at .*nowhere"):
        LatentDataset(tmp_path / "nowhere")


def test_a_table_of_another_origin_is_refused(tmp_path):
    lance.write_dataset(pa.table({"label": [1, 2]}), str(tmp_path / "other.lance"))
    with pytest.raises(ValueError, match=r"other\.lance.*without repa-fast's metadata"):
        LatentDataset(tmp_path / "other.lance")


def test_an_existing_table_is_refused_and_kept(tmp_path):
    dataset.write(tmp_path / "a.lance", make_rows(2), METADATA)
    with pytest.raises(ValueError, match="exists already"):
        dataset.write(tmp_path / "a.lance", make_rows(3, seed=1), METADATA)
    table = LatentDataset(tmp_path / "a.lance")
    assert len(table) == 2
    assert_equal_rows(table.rows(np.array([0, 1])), [0, 1], make_rows(2))


def test_moments_of_another_shape_are_refused_by_row(tmp_path):
    rows = make_rows()
    rows[13]["moments"] = rows[13]["moments"][:2]
    with pytest.raises(ValueError, match=r"row 13: .*\(2, 4, 4\).*expected \(4, 4, 4\)"):
        dataset.write(tmp_path / "a.lance", rows, METADATA)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_without_a_class_is_refused_by_row(tmp_path, label):
    rows = make_rows()
    rows[13]["label"] = label
    with pytest.raises(ValueError, match=rf"row 13: label is {label}, expected 0\.\.2"):
        dataset.write(tmp_path / "a.lance", rows, METADATA)


def test_a_failed_write_leaves_no_table(tmp_path):
    rows = make_rows()
    rows[13]["label"] = 3
    with pytest.raises((ValueError, OSError)):
        dataset.write(tmp_path / "a.lance", rows, METADATA, batch_rows=5)
    with pytest.raises(ValueError, match="no dataset"):
        LatentDataset(tmp_path / "a.lance")
    dataset.write(tmp_path / "a.lance", make_rows(), METADATA)
    assert len(LatentDataset(tmp_path / "a.lance")) == COUNT


def test_images_are_not_read_where_not_asked_for(tmp_path):
    dataset.write(tmp_path / "a.lance", make_rows(4), METADATA)
    lance.dataset(str(tmp_path / "a.lance")).drop_columns(["image"])
    rows = LatentDataset(tmp_path / "a.lance").rows(np.array([2, 0]), images=False)
    assert rows["image"] == []
    assert np.array_equal(rows["moments"][1], make_rows(4)[0]["moments"])
    assert rows["label"].tolist() == [2, 0] and rows["index"].tolist() == [2, 0]


def test_a_column_can_be_added_later(tmp_path):
    dataset.write(tmp_path / "a.lance", make_rows(6), METADATA)
    before = LatentDataset(tmp_path / "a.lance")
    lance.dataset(before.uri).add_columns({"twice": "label * 2"})
    after = LatentDataset(tmp_path / "a.lance")
    assert "twice" in lance.dataset(after.uri).schema.names
    assert after.metadata == METADATA
    for table in (before, after):
        assert_equal_rows(table.rows(np.array([5, 1])), [5, 1], make_rows(6))
