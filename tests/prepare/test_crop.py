"""ADM's centre crop against its description carried out on arrays, and encoding."""

import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repa_fast.data import dataset
from repa_fast.data.dataset import encode
from repa_fast.prepare.crop import center_crop, original
from tests.data.encoding import encode as saved

SKIMAGE_NAMES = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "retina.jpg",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "cell.png",
    "horse.png",
    "microaneurysms.png",
    "text.png",
)
SKLEARN_NAMES = ("china.jpg", "flower.jpg")


def photograph(name: str) -> Path:
    """One that scikit-learn or scikit-image brings along."""
    package, folder = "skimage", "data"
    if name in SKLEARN_NAMES:
        package, folder = "sklearn", "datasets/images"
    spec = find_spec(package)
    if spec is None:
        pytest.skip(f"{name} comes with {package}, which is not installed")
    return Path(spec.origin).parent / folder / name


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def halved(image: Image.Image) -> Image.Image:
    """Means of two columns, then of two rows, halves rounded up each time: Pillow's box filter
    keeps 8 bits between its passes. Odd sides take fractions of pixels: channel by channel."""
    width, height = image.size
    if width % 2 or height % 2:
        size = (width >> 1, height >> 1)
        bands = [band.resize(size, Image.Resampling.BOX) for band in image.split()]
        return Image.merge("RGB", bands)
    values = np.asarray(image).astype(int)
    values = (values[:, 0::2] + values[:, 1::2] + 1) // 2
    values = (values[0::2] + values[1::2] + 1) // 2
    return Image.fromarray(values.astype(np.uint8))


def described(path: Path, resolution: int) -> np.ndarray:
    """Halve while twice too large; the short side to R; cut out the middle with Image.crop."""
    image = Image.open(path).convert("RGB")
    for _ in range(int(np.log2(max(1, min(image.size) / resolution)))):
        image = halved(image)
    short, long = sorted(image.size)
    stretched = round(long * (resolution / short))
    size = (resolution, stretched) if image.width == short else (stretched, resolution)
    image = image.resize(size, Image.Resampling.BICUBIC)
    margin = (stretched - resolution) // 2
    left, top = (0, margin) if size[0] == resolution else (margin, 0)
    return np.array(image.crop((left, top, left + resolution, top + resolution)))


@pytest.mark.parametrize("resolution", [64, 256, 512])
@pytest.mark.parametrize("name", [*SKLEARN_NAMES, *SKIMAGE_NAMES])
def test_photographs_are_cropped_as_described(name, resolution):
    path = photograph(name)
    got = center_crop(path.read_bytes(), resolution, name)
    assert got.dtype == np.uint8 and got.shape == (resolution, resolution, 3)
    assert got.flags.c_contiguous and got.flags.writeable
    assert np.array_equal(got, described(path, resolution))


@pytest.mark.parametrize(
    "height, width, left, top", [(8, 13, 2, 0), (8, 12, 2, 0), (13, 8, 0, 2), (9, 8, 0, 0)]
)
def test_the_odd_pixel_is_cut_at_the_right_and_the_bottom(height, width, left, top):
    whole = pixels(height, width)
    assert np.array_equal(center_crop(saved(whole), 8), whole[top : top + 8, left : left + 8])


def test_an_image_of_the_resolution_is_unchanged():
    whole = pixels(48, 48)
    assert np.array_equal(center_crop(saved(whole), 48), whole)


def test_exactly_twice_the_resolution_is_halved():
    whole = pixels(16, 16)
    assert np.array_equal(center_crop(saved(whole), 8), halved(Image.fromarray(whole)))


def test_just_below_twice_the_resolution_is_not_halved():
    whole = pixels(15, 15)
    expected = Image.fromarray(whole).resize((8, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(center_crop(saved(whole), 8), np.asarray(expected))


def test_the_long_side_goes_to_the_nearest_pixel():
    """16 x 27 to 10 pixels is 10 x 16.875: as 17, three are cut at the left; as 16, also three,
    but other pixels."""
    whole = pixels(16, 27)
    expected = Image.fromarray(whole).resize((17, 10), Image.Resampling.BICUBIC)
    assert np.array_equal(center_crop(saved(whole), 10), np.asarray(expected)[:, 3:13])


def test_png_is_exact():
    assert np.array_equal(dataset.decode(encode(pixels(16, 16), "png"), 16), chw(pixels(16, 16)))


def chw(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 0, 1)


def test_jpeg_keeps_chroma_at_full_resolution_and_quality_counts():
    crop = center_crop(photograph("china.jpg").read_bytes(), 256)
    sizes, errors = [], []
    for quality in (75, 95):
        data = encode(crop, "jpeg", quality)
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == "JPEG" and image.mode == "RGB"
            assert [component[1:3] for component in image.layer] == [(1, 1)] * 3
        sizes.append(len(data))
        errors.append(np.abs(dataset.decode(data, 256).astype(int) - chw(crop)).mean())
    assert sizes[0] < sizes[1] and errors[1] < errors[0] < 5
    assert encode(crop, "jpeg") == encode(crop, "jpeg", 95)


@pytest.mark.parametrize(
    "array, options, message",
    [
        (pixels(8, 8), {"kind": "gif"}, "kind is 'gif', expected 'jpeg' or 'png'"),
        (pixels(8, 8), {"kind": "jpeg", "quality": 0}, r"quality is 0, expected 1\.\.100"),
        (pixels(8, 8).astype(np.float32), {}, r"float32 \(8, 8, 3\), expected uint8"),
        (chw(pixels(8, 8)), {}, r"uint8 \(3, 8, 8\), expected uint8 \(R, R, 3\)"),
    ],
)
def test_what_cannot_be_encoded_is_refused(array, options, message):
    with pytest.raises(ValueError, match=message):
        encode(array, **options)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_original_is_kept_to_the_byte_and_reads_as_its_crop(kind, mode):
    data = saved(Image.fromarray(pixels(16, 16)).convert(mode), kind)
    assert original(data, 16, "a") is data
    assert np.array_equal(dataset.decode(data, 16), chw(center_crop(data, 16)))


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(pixels(16, 16)), "JPEG", exif=exif)


@pytest.mark.parametrize(
    "data, message",
    [
        (saved(pixels(16, 17)), "is 17x16, expected 16x16"),
        (saved(Image.fromarray(pixels(16, 16)), "WEBP"), "is WEBP, expected JPEG or PNG"),
        (saved(Image.new("CMYK", (16, 16)), "JPEG"), "has mode CMYK, expected RGB or L"),
        (saved(Image.new("RGBA", (16, 16)), "PNG"), "has mode RGBA, expected RGB or L"),
        (rotated(), "has EXIF orientation 6, expected 1"),
        (b"text", "is not an image"),
        (b"", "is empty"),
    ],
)
def test_an_original_that_readers_disagree_about_is_refused(data, message):
    with pytest.raises(ValueError, match=rf"^a\.jpg: {message}"):
        original(data, 16, "a.jpg")
