"""Encoded images to uint8 arrays, and back."""

import io

import numpy as np


def decode(data: bytes, resolution: int, name: str = "image") -> np.ndarray:
    """PNG or JPEG bytes -> uint8 RGB (3, resolution, resolution).

    Raises:
        ValueError: the bytes cannot be decoded or have another size; `name` is in the message.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name}: cannot be decoded ({error})") from error
    if pixels.shape[:2] != (resolution, resolution):
        height, width = pixels.shape[:2]
        raise ValueError(f"{name}: is {width}x{height}, expected {resolution}x{resolution}")
    return pixels.transpose(2, 0, 1)


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 RGB (R, R, 3) -> PNG bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
