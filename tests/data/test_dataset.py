"""The native table: what is written comes back, and what does not fit is refused by name."""

import json
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest

from repa_fast.data import dataset
from repa_fast.data.dataset import LatentDataset, Metadata
from repa_fast.data.digits import digits_metadata
from repa_fast.data.loader import read_batch
from repa_fast.words import short
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

    def moments() -> np.ndarray:
        mean, deviation = generator.standard_normal((2, 2, 4, 4), dtype=np.float32)
        return np.concatenate([mean, np.abs(deviation)])

    return [
        {
            "image": generator.bytes(20 + 7 * index),
            "moments": moments(),
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


NAN, INF = float("nan"), float("inf")
COUNTED, NAMES = "expected an integer above 0", "expected texts, at least one"
OTHER_FIELDS = [
    *[({"resolution": v}, f"resolution is .*, {COUNTED}") for v in (0, -1, 16.0, True, "16", None)],
    *[
        ({"latent_shape": value}, "latent_shape is .*, expected three integers above 0")
        for value in (4, "444", [4, 4], [4, 4, 4, 4], [4, 4, 0], [4, 4, 4.0], [4, 4, [4]], {})
    ],
    *[({"vae": value}, "vae is .*, expected text") for value in (None, 3, ["x"])],
    *[
        ({"scale": value}, "scale is .*, expected a number from 1e-06 to 1e.06, or its negative")
        for value in (0, 0.0, 1e-320, 9e-7, -2e6, 10**400, NAN, INF, -INF, "1", None, [1.0], True)
    ],
    *[
        ({"bias": value}, r"bias is .*, expected a number of at most 1e\+06 either way")
        for value in (NAN, INF, -1.1e6, 1e300, "0", None, [0])
    ],
    *[({"class_names": v}, f"class_names is .*, {NAMES}") for v in ([], "abc", None, [1], {}, 3)],
    ({"extra": 1}, r"has \['extra'\] too, expected resolution, latent_shape, vae"),
]


@pytest.mark.parametrize("changes, words", OTHER_FIELDS, ids=[str(c) for c, _ in OTHER_FIELDS])
def test_metadata_that_is_not_as_written_is_refused_by_field(changes, words):
    refused(lambda: Metadata.from_dict(asdict(METADATA) | changes), f"^{words}")


def test_metadata_may_lack_nothing_and_hold_integers_as_numbers():
    for name in asdict(METADATA):
        fields = {key: value for key, value in asdict(METADATA).items() if key != name}
        refused(lambda fields=fields: Metadata.from_dict(fields), f"^lacks {name}, expected reso")
    refused(lambda: Metadata.from_dict([1]), r"^is \[1\], expected resolution, .* by name")
    for scale, bias in ((1, 0), (-1e-6, -1e6), (1e6, 1e6)):
        assert Metadata.from_dict(asdict(METADATA) | {"scale": scale, "bias": bias}).scale == scale
    assert Metadata.from_dict(json.loads(json.dumps(asdict(METADATA)))) == METADATA


def arrow(rows: int = 3, metadata: bytes | None = None, **changes):
    """A table of that many rows, some of its columns changed (None: left out), and its metadata."""
    whole = pa.Table.from_batches([dataset.record_batch(make_rows(4), dataset.schema(METADATA))])
    columns = {name: whole[name][:rows] for name in whole.schema.names} | changes
    table = pa.table({name: column for name, column in columns.items() if column is not None})
    text = metadata or json.dumps(asdict(METADATA)).encode()
    return table.replace_schema_metadata({b"repa_fast": text})


def lists(kind, size: int = 64):
    return pa.array([[0] * size] * 3, pa.list_(kind, size))


OTHER_TABLES = [
    ({"metadata": b"{"}, "metadata repa_fast is damaged .Expecting property name"),
    ({"metadata": b"[" * 100_000}, "metadata repa_fast is damaged .*recursion.*, expected JSON"),
    ({"metadata": b"[1]"}, r"metadata repa_fast: is \[1\], expected resolution"),
    ({"metadata": b'{"scale": NaN}'}, "metadata repa_fast: lacks resolution, latent_shape, vae, "),
    (
        {"metadata": json.dumps(asdict(METADATA) | {"latent_shape": [10**9] * 3}).encode()},
        "too large",
    ),
    ({"label": None}, "there is no column label, expected one of int64"),
    ({"moments": None}, r"there is no column moments, expected one of fixed_size_list.*\[64\]"),
    ({"label": pa.array([0.0, 1.0, 2.0])}, "column label is double, expected int64"),
    ({"label": pa.array("abc")}, "column label is string, expected int64"),
    ({"moments": lists(pa.float64())}, r"column moments is .*double>\[64\], expected .*float>\[64"),
    ({"moments": lists(pa.float32(), 32)}, r"column moments is .*\[32\], expected .*\[64\]"),
    ({"image": pa.array("abc")}, "column image is string, expected binary"),
    ({"rows": 0}, "has no rows, expected at least one"),
]


@pytest.mark.parametrize("changes, words", OTHER_TABLES, ids=[words for _, words in OTHER_TABLES])
def test_a_table_that_is_not_as_written_is_refused_when_it_is_opened(tmp_path, changes, words):
    lance.write_dataset(arrow(**changes), str(tmp_path / "a.lance"))
    refused(lambda: LatentDataset(tmp_path / "a.lance"), r"/a\.lance", words)


def without(value: object, kind) -> "pa.Array":
    """Three values of which the second is null."""
    return pa.array([value, None, value], kind)


NULLS = [
    ({"label": without(1, pa.int64())}, r"label is -1, expected 0\.\.2"),
    ({"moments": without([1.0] * 64, pa.list_(pa.float32(), 64))}, "moments are not finite"),
    (
        {"moments": pa.array([[1.0] * 64, [1.0] * 63 + [None], [1.0] * 64],
                             pa.list_(pa.float32(), 64))},
        "moments are not finite",
    ),
    ({"image": without(dataset.encode(np.zeros((32, 32, 3), np.uint8)), pa.binary())}, "is empty"),
]  # fmt: skip


@pytest.mark.parametrize("changes, words", NULLS, ids=["label", "moments", "a moment", "image"])
def test_what_is_null_is_a_bad_row(tmp_path, changes, words):
    lance.write_dataset(arrow(**changes), str(tmp_path / "a.lance"))
    table = LatentDataset(tmp_path / "a.lance")
    read = partial(read_batch, table, np.array([1, 0]), images="image" in changes)
    refused(read, rf"a\.lance row 1: .*{words}")
    skipped = []
    batch = read(skipped=skipped)
    assert batch["index"].tolist() == [2, 0] and len(skipped) == 1
    assert batch["label"].dtype.itemsize == 8 and batch["moments"].dtype.itemsize == 4


def test_large_bytes_are_images_and_a_table_without_any_says_so_when_they_are_asked_for(tmp_path):
    image = dataset.encode(np.zeros((32, 32, 3), np.uint8))
    for name, column in (("a", pa.array([image] * 3, pa.large_binary())), ("b", None)):
        lance.write_dataset(arrow(image=column), str(tmp_path / f"{name}.lance"))
    assert read_batch(LatentDataset(tmp_path / "a.lance"), np.arange(3))["image"].sum() == 0
    refused(lambda: LatentDataset(tmp_path / "b.lance").rows(np.arange(2)), "has no column image")


class PanicException(BaseException):
    """As PyO3's, which Rust's panics come as."""


@pytest.mark.parametrize("place", ["dataset", "count_rows", "take"])
def test_a_panic_of_lance_names_the_damaged_table(written, monkeypatch, place):
    def panic(*_, **__):
        raise PanicException("called `Result::unwrap()`\non an `Err` value: " + "x" * 999)

    path = written(2)
    monkeypatch.setattr(lance if place == "dataset" else lance.LanceDataset, place, panic)
    words = r"a\.lance.* is damaged, expected a Lance table \(called `Result::unwrap\(\)`"
    message = refused(lambda: LatentDataset(path).rows(np.array([0])), words)
    assert len(message) < 300


def test_other_ends_of_a_process_pass_through(written, monkeypatch):
    table = LatentDataset(written(2))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(lance.LanceDataset, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        table.rows(np.array([0]))


def test_what_a_stranger_gave_is_shown_in_one_short_line():
    bomb = [1, 1]
    for _ in range(60):
        bomb = [bomb, bomb]
    for value in (bomb, {"a": bomb}, "\x1b[31m\n" * 10**6, -(10**5000), ["x" * 10**6] * 10**6):
        line = short(value)
        assert len(line) <= 70 and line.isprintable()
        fields = asdict(METADATA) | {"resolution": value}
        assert (
            len(refused(lambda fields=fields: Metadata.from_dict(fields), "^resolution is")) < 120
        )
    assert (short([1, "a"]), short("a\nb"), short(None)) == ("[1, 'a']", "'a\\nb'", "None")


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
        (
            {"moments": -make_rows()[13]["moments"]},
            "a standard deviation is below 0, expected none",
        ),
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


def test_a_full_disk_is_named_by_the_table(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("LanceError(IO): No space left on device (os error 28), /x/y.rs:190:9")

    monkeypatch.setattr(lance, "write_dataset", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*x\.lance'$"):
        dataset.write(tmp_path / "x.lance", [], digits_metadata())
