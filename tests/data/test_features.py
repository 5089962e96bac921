import numpy as np
import pytest
import torch

from repa_fast.data.features import feature_columns
from tests.prepare.extracting import column


def features(seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((5, 4, 6), generator=generator) * scale


def unpacked(of, values):
    packed = of.pack(values)
    return of.unpack({name: torch.from_numpy(array) for name, array in packed.items()})


def test_fp16_is_rounding():
    assert torch.equal(unpacked(column(), features()), features().half())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_int8_is_off_by_half_a_level_at_most(scale):
    values = features(scale=scale)
    level = values.abs().amax(-1, keepdim=True) / 127
    error = (unpacked(column(storage="int8"), values).double() - values.double()).abs()
    assert (error <= level.double() * (0.5 + 1e-4)).all() and error.max() > 0.3 * level.min()


def test_a_token_of_zeros_stays_one():
    values = features()
    values[2, 1] = 0
    for storage in ("fp16", "int8"):
        assert (unpacked(column(storage=storage), values)[2, 1] == 0).all()


@pytest.mark.parametrize("storage", ["fp16", "int8"])
def test_bytes_per_image_are_those_of_the_arrays(storage):
    of = column(storage=storage)
    packed = of.pack(features())
    assert list(packed) == of.columns
    assert sum(array.nbytes for array in packed.values()) == 5 * of.bytes_per_image


@pytest.mark.parametrize("storage", ["fp16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_refused(storage, value):
    values = features()
    values[4, 3, 5] = value
    with pytest.raises(ValueError, match="made-up: features reach"):
        column(storage=storage).pack(values)


def test_fp16_refuses_what_it_cannot_hold_and_int8_holds_it():
    values = features()
    values[0, 0, 0] = 7e4
    with pytest.raises(ValueError, match="at most 65504 for fp16"):
        column().pack(values)
    assert unpacked(column(storage="int8"), values)[0, 0, 0] == pytest.approx(7e4)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"shape \(5, 3, 6\), expected \(5, 4, 6\)"):
        column().pack(features()[:, :3])


@pytest.mark.parametrize(
    "asked",
    [("other", 8, 4, 6), ("made-up", 16, 4, 6), ("made-up", 8, 5, 6), ("made-up", 8, 4, 7)],
)
def test_a_column_of_something_else_is_refused(asked):
    column().expect("made-up", 8, 4, 6)
    with pytest.raises(ValueError, match="column made_up holds 4 tokens of width 6 by made-up"):
        column().expect(*asked)


def test_the_description_travels_in_the_schema():
    import pyarrow as pa

    columns = [column(), column(name="small", storage="int8")]
    fields = [pa.field("label", pa.int64()), *columns[0].fields(), *columns[1].fields()]
    found = feature_columns(pa.schema(fields, metadata={b"repa_fast": b"{}"}))
    assert found == {"made_up": columns[0], "small": columns[1]}


def test_packed_arrays_are_of_their_own_memory():
    values = features().half()
    packed = column().pack(values)["made_up"]
    values.zero_()
    assert np.abs(packed).max() > 0
