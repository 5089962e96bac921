import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from repa_fast.data.dataset import LatentDataset
from repa_fast.data.features import feature_columns
from repa_fast.data.loader import read_batch
from tests.prepare.extracting import begin, column
from tests.refusals import refused

either_storage = pytest.mark.parametrize("storage", ["fp16", "int8"])


def features(scale=1.0, **changes):
    """(5, 4, 6) normal numbers; `last` and `first` replace two of them."""
    values = torch.randn((5, 4, 6), generator=torch.Generator().manual_seed(0)) * scale
    values[0, 0, 0] = changes.get("first", values[0, 0, 0])
    values[4, 3, 5] = changes.get("last", values[4, 3, 5])
    return values


def unpacked(storage, values):
    of = column(storage=storage)
    return of.unpack({name: torch.from_numpy(array) for name, array in of.pack(values).items()})


def test_fp16_is_rounding_into_memory_of_its_own():
    values = features().half()
    assert torch.equal(unpacked("fp16", features()), values)
    packed = column().pack(values)["made_up"]
    values.zero_()
    assert np.array_equal(packed, features().half().numpy())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_int8_is_off_by_half_a_level_at_most(scale):
    values = features(scale)
    level = values.abs().amax(-1, keepdim=True) / 127
    error = (unpacked("int8", values).double() - values.double()).abs()
    assert (error <= level.double() * (0.5 + 1e-4)).all() and error.max() > 0.3 * level.min()


@either_storage
def test_a_token_of_zeros_stays_one_and_bytes_are_those_of_the_arrays(storage):
    values = features()
    values[2, 1] = 0
    assert (unpacked(storage, values)[2, 1] == 0).all()
    of = column(storage=storage)
    packed = of.pack(values)
    assert list(packed) == of.columns
    assert sum(array.nbytes for array in packed.values()) == 5 * of.bytes_per_image


@either_storage
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_refused(storage, value):
    refused(lambda: column(storage=storage).pack(features(last=value)), "made-up: features reach")


def test_fp16_refuses_what_it_cannot_hold_and_int8_holds_it():
    values = features(first=7e4)
    refused(lambda: column().pack(values), "at most 65504 for fp16")
    assert unpacked("int8", values)[0, 0, 0] == pytest.approx(7e4)
    words = r"shape \(5, 3, 6\), expected \(5, 4, 6\)"
    refused(lambda: column().pack(values[:, :3]), words)


@pytest.mark.parametrize(
    "asked", [("other", 8, 4, 6), ("made-up", 16, 4, 6), ("made-up", 8, 5, 6), ("made-up", 8, 4, 7)]
)
def test_a_column_of_something_else_is_refused(asked):
    column().expect("made-up", 8, 4, 6)
    words = "column made_up holds 4 tokens of width 6 by made-up"
    refused(lambda: column().expect(*asked), words)


def test_the_description_travels_in_the_schema():
    import pyarrow as pa

    columns = [column(), column(name="small", storage="int8")]
    fields = [pa.field("label", pa.int64()), *columns[0].fields(), *columns[1].fields()]
    found = feature_columns(pa.schema(fields, metadata={b"repa_fast": b"{}"}))
    assert found == {"made_up": columns[0], "small": columns[1]}


OTHERS = [
    (b"{", "Expecting"),
    (b"[" * 100_000, "is damaged .*recursion.*, expected JSON"),
    (b"[]", "expected encoder, resolution"),
    ({"extra": 1}, "has .'extra'. too"),
    ({"tokens": 0}, "tokens is 0, expected an integer above 0"),
    ({"width": "6"}, "width is '6', expected an integer above 0"),
    ({"encoder": None}, "encoder is None, expected text"),
    ({"storage": "fp8"}, "storage is 'fp8', expected fp16 or int8"),
    ({"precision": []}, r"precision is \[\], expected fp32 or bf16"),
    ({"name": "other"}, "name is 'other', expected 'made_up'"),
    ({"width": 7}, r"column made_up is .*halffloat>\[24\], expected .*halffloat>\[28\]"),
    ({"width": 2**40}, "too large"),
    ({"storage": "int8"}, "column made_up is .*halffloat.*, expected .*int8"),
]


@pytest.mark.parametrize("changes, words", OTHERS, ids=[words for _, words in OTHERS])
def test_a_description_that_is_none_is_refused_by_column(changes, words):
    import pyarrow as pa

    text = json.dumps(asdict(column()) | changes).encode() if isinstance(changes, dict) else changes
    field = column().fields()[0].with_metadata({b"repa_fast": text})
    refused(lambda: feature_columns(pa.schema([field])), "^column made_up: ", words)
    values = column(storage="int8").fields()[0]
    refused(lambda: feature_columns(pa.schema([values])), "there is no column made_up_scale, exp")


@pytest.mark.parametrize(
    "storage, name", [("fp16", "made_up"), ("int8", "made_up"), ("int8", "made_up_scale")]
)
def test_features_that_are_null_are_a_bad_row(tmp_path, storage, name):
    import pyarrow as pa

    of = column(storage=storage)
    begin(tmp_path, rows=4)
    packed = of.pack(torch.ones(4, 4, 6))
    arrays = []
    for field in of.fields():
        rows = packed[field.name].reshape(4, -1).tolist()
        rows[1] = None if field.name == name else rows[1]
        rows[2] = [*rows[2][:-1], None] if field.name == name else rows[2]
        arrays.append(pa.array(rows, field.type))
    batch = pa.record_batch(arrays, schema=pa.schema(of.fields()))
    added = pa.RecordBatchReader.from_batches(batch.schema, [batch])
    LatentDataset(tmp_path).table.add_columns(added)
    table = LatentDataset(tmp_path)
    for row in (1, 2):
        words = f"row {row}: {name} is (null|not finite)"
        refused(lambda row=row: read_batch(table, np.array([row]), features=["made_up"]), words)
    skipped = []
    batch = read_batch(table, np.arange(4), features=["made_up"], skipped=skipped)
    assert batch["index"].tolist() == [0, 3, 3, 3] and len(skipped) == 3
    assert batch["made_up"].dtype == (torch.int8 if storage == "int8" else torch.float16)
    assert torch.allclose(of.unpack(batch).float(), torch.ones(4, 4, 6))
