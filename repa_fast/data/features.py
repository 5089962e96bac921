"""Features of a frozen encoder as a column of the dataset, instead of images and the encoder.

A token's features are stored as fp16, or as int8 with one fp32 scale per token (the largest
magnitude over 127). An image of N tokens of width D takes 2 N D bytes, or N (D + 4): with DINOv2-B
at 256 pixels 393 kB or 198 kB, where the image itself, a JPEG, takes about 15 kB.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from repa_fast.data.store import from_lists

if TYPE_CHECKING:
    import pyarrow as pa

Storage = Literal["fp16", "int8"]

METADATA_KEY = b"repa_fast"
INT8_MAX = 127
FP16_MAX = 65504.0


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


def feature_columns(schema: "pa.Schema") -> dict[str, FeatureColumn]:
    """Return the columns of features of a table, by name."""
    stored = [(field.metadata or {}).get(METADATA_KEY) for field in schema]
    columns = [FeatureColumn(**json.loads(text)) for text in stored if text is not None]
    return {column.name: column for column in columns}
