"""The native table: what is written comes back, and what does not fit is refused by name."""

import numpy as np
import pytest

from repa_fast.data import dataset
from repa_fast.data.dataset import LatentDataset, Metadata
from tests.refusals import refused

lance = pytest.importorskip("lance")
pa = pytest.importorskip("pyarrow")

METADATA = Metadata(
    resolution=32, latent_shape=(2, 4, 4), vae="some-vae", scale=0.18215, bias=-0.125,
    class_names=("ant", "bee", "cicada"),
)  # fmt: skip
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


@pytest.fixture
def written(tmp_path):
    """(count) -> path of a table of so many rows."""

    def write(count: int, seed: int = 0):
        dataset.write(tmp_path / "a.lance", make_rows(count, seed), METADATA)
        return tmp_path / "a.lance"

    return write


def assert_rows(table: LatentDataset, indices: list[int], expected: list[dataset.Row]) -> None:
    got, rows = table.rows(np.array(indices)), [expected[index] for index in indices]
    columns = {name: [row[name] for row in rows] for name in ("image", "moments", "label")}
    np.testing.assert_equal(got, columns | {"index": indices, "features": {}})
    dtypes = {"index": np.int64, "moments": np.float32, "label": np.int64}
    assert {name: got[name].dtype for name in dtypes} == dtypes


def test_rows_come_back_exactly_in_the_order_asked_for_and_so_does_metadata(folder):
    table, every = LatentDataset(folder), [*range(COUNT)]
    for indices in (every, every[::-1], [7], [22, 0, 11, 5, 4], [3, 3, 19, 3, 0, 0]):
        assert_rows(table, indices, make_rows())
    assert table.metadata == METADATA
    assert METADATA.moments_shape == (4, 4, 4)  # mean and standard deviation of each channel


@pytest.mark.parametrize("split, count, seed", [("train", COUNT, 0), ("val", 4, 1)])
def test_a_folder_resolves_to_its_split_and_a_table_can_be_named_itself(folder, split, count, seed):
    table = LatentDataset(folder, split)
    assert len(table) == count and table.uri == str(folder / f"{split}.lance")
    assert_rows(table, [2, 1], make_rows(count, seed))
    assert len(LatentDataset(str(folder / f"{split}.lance"))) == count


def test_what_is_no_table_is_refused(folder, tmp_path):
    refused(lambda: LatentDataset(folder, "test"), "no dataset")
    refused(lambda: LatentDataset(tmp_path / "nowhere"), r"no dataset at .*nowhere")
    lance.write_dataset(pa.table({"label": [1, 2]}), str(tmp_path / "other.lance"))
    words = r"other\.lance.*without repa-fast's metadata"
    refused(lambda: LatentDataset(tmp_path / "other.lance"), words)


def test_an_existing_table_is_refused_and_kept(written):
    table = LatentDataset(written(2))
    refused(lambda: written(3, seed=1), "exists already")
    assert len(LatentDataset(table.uri)) == 2
    assert_rows(LatentDataset(table.uri), [0, 1], make_rows(2))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"moments": make_rows()[13]["moments"][:2]}, r".*\(2, 4, 4\).*expected \(4, 4, 4\)"),
        ({"label": -1}, r"label is -1, expected 0\.\.2"),
        ({"label": 3}, r"label is 3, expected 0\.\.2"),
    ],
)
def test_a_row_that_does_not_fit_is_named_and_leaves_no_table(tmp_path, written, changes, words):
    rows, path = make_rows(), tmp_path / "a.lance"
    rows[13] |= changes
    refused(lambda: dataset.write(path, rows, METADATA), f"row 13: {words}")
    with pytest.raises((ValueError, OSError)):
        dataset.write(path, rows, METADATA, batch_rows=5)
    refused(lambda: LatentDataset(path), "no dataset")
    assert len(LatentDataset(written(COUNT))) == COUNT


def test_images_are_not_read_where_not_asked_for(written):
    path = written(4)
    lance.dataset(str(path)).drop_columns(["image"])
    rows = LatentDataset(path).rows(np.array([2, 0]), images=False)
    assert rows["image"] == []
    assert np.array_equal(rows["moments"][1], make_rows(4)[0]["moments"])
    assert rows["label"].tolist() == [2, 0] and rows["index"].tolist() == [2, 0]
