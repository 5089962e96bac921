"""Encoded images of many kinds, tables of them, and what is read of those."""

import io
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from repa_fast.data import dataset
from repa_fast.data.dataset import LatentDataset, Metadata

R, COUNT = 32, 40
EXIF_ORIENTATION = 0x0112


def encode(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def autoencoder(blocks: int) -> torch.nn.Module:
    """A random one of diffusers', which divides the side by 2 per block after the first."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    ).eval()


def noise(seed: int = 0, side: int = R) -> np.ndarray:
    """Smooth enough that JPEG damage is seen: uint8 (side, side, 3)."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((side, side)))


def write_table(uri: Path, replaced: dict[int, bytes] | None = None) -> LatentDataset:
    """COUNT rows, PNG and JPEG in turn, some images replaced."""
    metadata = Metadata(
        resolution=R, latent_shape=(1, 2, 2), vae="x", scale=1.0, bias=0.0, class_names=("a", "b")
    )
    images = [encode(noise(index), ("PNG", "JPEG")[index % 2]) for index in range(COUNT)]
    images = dict(enumerate(images)) | (replaced or {})
    moments = [np.full(metadata.moments_shape, index, np.float32) for index in range(COUNT)]
    rows = [{"image": images[i], "moments": moments[i], "label": i % 2} for i in range(COUNT)]
    dataset.write(uri, rows, metadata)
    return LatentDataset(uri)


def unusual(photo: np.ndarray) -> dict[str, bytes]:
    """Files that Pillow takes and DALI may not, or not in the same way."""
    image = Image.fromarray(photo)
    grey16 = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    jpeg = encode(image, "JPEG")
    return {
        "16 bits": encode(grey16),
        "16-bit colours": png16(np.random.default_rng(0).integers(0, 65536, (R, R, 3))),
        "CMYK": encode(image.convert("CMYK"), "JPEG"),
        "GIF": encode(image, "GIF"),
        "WebP": encode(image, "WEBP"),
        "cut PNG": encode(image)[:-4],
        "JPEG and more": jpeg + b"more",
    }


def png16(array: np.ndarray) -> bytes:
    """(h, w, 1 or 3) below 65536 -> a PNG of 16 bits a channel, which Pillow cannot write."""
    height, width, channels = array.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in array)
    return png_of(width, height, 16, {1: 0, 3: 2}[channels], lines)


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""
    return png_of(width, height, 8, 2, b"")


def damaged(png: bytes) -> bytes:
    """Its body has a hole."""
    start = png.index(b"IDAT") + 10
    return png[:start] + bytes(40) + png[start + 40 :]


def turned(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    """An image whose EXIF orientation is 6."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    return encode(pixels, kind, exif=exif, **options)


def png_of(width: int, height: int, bits: int, colour: int, lines: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
        crc = zlib.crc32(kind + data)
        png += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)
    return png


def usual(photo: np.ndarray) -> list[bytes]:
    """Files of every kind that DALI decodes."""
    image = Image.fromarray(photo)
    alpha = image.convert("RGBA")
    alpha.putalpha(image.convert("L"))
    modes = [image.convert(mode) for mode in ("1", "L", "P")] + [alpha, alpha.convert("LA")]
    return [
        *[encode(mode) for mode in modes],
        encode(image.convert("P"), transparency=0),
        turned(image),
        turned(image, "JPEG"),
        encode(image.convert("L"), "JPEG"),
    ]


def own_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("repa-fast")]


def assert_equal_batches(got: dict, expected: dict) -> None:
    assert set(got) == set(expected)
    for name in expected:
        assert got[name].dtype == expected[name].dtype
        assert torch.equal(got[name].cpu(), expected[name]), name
