"""Features of a frozen encoder as a column of the dataset, instead of images and the encoder.

A token's features are stored as fp16, or as int8 with one fp32 scale per token (the largest
magnitude over 127). An image of N tokens of width D takes 2 N D bytes, or N (D + 4): with DINOv2-B
at 256 pixels 393 kB or 198 kB, where the image itself, a JPEG, takes about 15 kB.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from repa_fast.data.store import from_lists
from repa_fast.whole import parse_json
from repa_fast.words import short

if TYPE_CHECKING:
    import pyarrow as pa

Storage = Literal["fp16", "int8"]

METADATA_KEY = b"repa_fast"
INT8_MAX = 127
FP16_MAX = 65504.0

Fields = Mapping[str, tuple[str, Callable[[object], bool]]]
"""By the name of a field: what is expected of its value, in words, and whether that is it."""
TEXT = ("text", lambda value: isinstance(value, str))
UNSIGNED = ("an integer from 0 on", lambda value: type(value) is int and value >= 0)
COUNT = ("an integer above 0", lambda value: type(value) is int and value > 0)


def one_of(*choices: str) -> tuple[str, Callable[[object], bool]]:
    """Return what is expected of a field that is one of some texts."""
    return " or ".join(choices), lambda value: value in choices


@contextmanager
def describing(what: str) -> Iterator[None]:
    """Raise ValueError that names `what`, whatever is wrong with its description in JSON."""
    try:
        yield
    except (ValueError, RecursionError, OverflowError) as error:  # of parts in parts, of huge sizes
        raise ValueError(f"{what}: {error}") from error


def expect_fields(given: object, expected: Fields) -> None:
    """Raise ValueError, of one line, unless `given`, from JSON, has these fields and no other."""
    names = ", ".join(expected)
    if not isinstance(given, dict):
        raise ValueError(f"is {short(given)}, expected {names} by name")
    if lacking := [name for name in expected if name not in given]:
        raise ValueError(f"lacks {', '.join(lacking)}, expected {names}")
    if more := [name for name in given if name not in expected]:
        raise ValueError(f"has {short(more)} too, expected {names} alone")
    for name, (words, fits) in expected.items():
        if not fits(given[name]):
            raise ValueError(f"{name} is {short(given[name])}, expected {words}")


@dataclass(frozen=True, kw_only=True)
class FeatureColumn:
    """What a column of features holds."""

    name: str
    encoder: str  # as in `--enc-type`
    resolution: int  # of the images it saw, in pixels
    tokens: int  # N, patch tokens per image
    width: int  # D, features per token
    storage: Storage
    precision: str  # in which the encoder ran, "fp32" or "bf16"

    @classmethod
    def from_field(cls, field: "pa.Field", schema: "pa.Schema") -> "FeatureColumn":
        """Return the column that the metadata of its first field describes.

        ValueError if it is no such description, or of another column than there is.
        """
        with describing(f"column {field.name}"):
            fields = parse_json(field.metadata[METADATA_KEY], "its description")
            own = (repr(field.name), lambda value: value == field.name)
            expect_fields(fields, DESCRIPTION | {"name": own})
            column = cls(**fields)
            for expected in column.fields():
                expect_type(schema, expected)
        return column

    @property
    def scale_name(self) -> str:
        """Name of the column of scales, for int8."""
        return f"{self.name}_scale"

    @property
    def columns(self) -> list[str]:
        """Columns of the table that hold it."""
        return [self.name] if self.storage == "fp16" else [self.name, self.scale_name]

    @property
    def bytes_per_image(self) -> int:
        if self.storage == "fp16":
            return 2 * self.tokens * self.width
        return self.tokens * (self.width + 4)

    def fields(self) -> list["pa.Field"]:
        """Return Arrow's fields; the first one's metadata is this description."""
        import pyarrow as pa

        kind = pa.float16() if self.storage == "fp16" else pa.int8()
        metadata = {METADATA_KEY: json.dumps(asdict(self)).encode()}
        values = pa.field(self.name, pa.list_(kind, self.tokens * self.width), metadata=metadata)
        if self.storage == "fp16":
            return [values]
        return [values, pa.field(self.scale_name, pa.list_(pa.float32(), self.tokens))]

    def pack(self, features: torch.Tensor) -> dict[str, np.ndarray]:
        """Convert features (B, N, D) to arrays by column: values (B, N, D), scales (B, N).

        Raises:
            ValueError: another shape, or values that are not finite or beyond fp16.
        """
        expected = (len(features), self.tokens, self.width)
        if tuple(features.shape) != expected:
            raise ValueError(
                f"{self.encoder}: features have shape {tuple(features.shape)}, expected {expected}"
            )
        features = features.detach().float()
        largest = features.abs().amax(-1)
        bound = FP16_MAX if self.storage == "fp16" else torch.finfo(torch.float32).max
        if not bool((largest <= bound).all()):  # false for NaN too
            raise ValueError(
                f"{self.encoder}: features reach {float(largest.max())}, expected finite ones of "
                f"at most {bound:g} for {self.storage}"
            )
        if self.storage == "fp16":
            return {self.name: features.half().cpu().numpy()}
        scale = largest / INT8_MAX
        levels = (features / torch.where(scale == 0, 1, scale)[..., None]).round()
        return {
            self.name: levels.to(torch.int8).cpu().numpy(),
            self.scale_name: scale.cpu().numpy(),
        }

    def read(self, table: "pa.Table") -> dict[str, np.ndarray]:
        """Return the arrays that `pack` made, by column, of rows of the table."""
        shapes = {self.name: (self.tokens, self.width), self.scale_name: (self.tokens,)}
        return {name: from_lists(table[name], shapes[name]) for name in self.columns}

    def unpack(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the features (B, N, D) of a batch, on its device: fp16, or fp32 from int8."""
        values = batch[self.name]
        if self.storage == "fp16":
            return values
        return values.float() * batch[self.scale_name][..., None]

    def expect(self, encoder: str, resolution: int, tokens: int, width: int) -> None:
        """Raise ValueError unless it holds that encoder's tokens of images of `resolution`."""
        expected = (encoder, resolution, tokens, width)
        if (self.encoder, self.resolution, self.tokens, self.width) != expected:
            raise ValueError(
                f"column {self.name} holds {self.tokens} tokens of width {self.width} by "
                f"{self.encoder} from {self.resolution} pixels, expected {tokens} of width "
                f"{width} by {encoder} from {resolution} pixels"
            )


DESCRIPTION = {"encoder": TEXT, "resolution": COUNT, "tokens": COUNT, "width": COUNT}
DESCRIPTION |= {"storage": one_of("fp16", "int8"), "precision": one_of("fp32", "bf16")}


def feature_columns(schema: "pa.Schema") -> dict[str, FeatureColumn]:
    """Return the columns of features of a table, by name; ValueError names one that is none."""
    fields = [field for field in schema if METADATA_KEY in (field.metadata or {})]
    return {field.name: FeatureColumn.from_field(field, schema) for field in fields}


def expect_type(schema: "pa.Schema", field: "pa.Field") -> None:
    """Raise ValueError unless a table has such a column; its bytes may be of the large type."""
    if field.name not in schema.names:
        raise ValueError(f"there is no column {field.name}, expected one of {field.type}")
    kind = schema.field(field.name).type
    if kind != field.type and (str(kind), str(field.type)) != ("large_binary", "binary"):
        raise ValueError(f"column {field.name} is {kind}, expected {field.type}")
