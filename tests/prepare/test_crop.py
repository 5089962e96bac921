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
from tests.data.encoding import turned
from tests.prepare.writing import rgb
from tests.refusals import refused

PACKAGES = {"skimage": "data", "sklearn": "datasets/images"}
PHOTOGRAPHS = {
    "sklearn": ("china.jpg", "flower.jpg"),
    "skimage": (
        "astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "text.png",
        "hubble_deep_field.jpg", "motorcycle_left.png", "cell.png", "horse.png",
        "microaneurysms.png",
    ),
}  # fmt: skip


def photograph(package: str, name: str) -> Path:
    """One that scikit-learn or scikit-image brings along."""
    spec = find_spec(package)
    if spec is None:
        pytest.skip(f"{name} comes with {package}, which is not installed")
    return Path(spec.origin).parent / PACKAGES[package] / name


def described(path: Path, resolution: int) -> np.ndarray:
    """Halve while twice too large; the short side to R; cut out the middle with Image.crop."""
    image = Image.open(path).convert("RGB")
    for _ in range(int(np.log2(max(1, min(image.size) / resolution)))):
        image = image.resize((image.width >> 1, image.height >> 1), Image.Resampling.BOX)
    short, long = sorted(image.size)
    stretched = round(long * (resolution / short))
    size = (resolution, stretched) if image.width == short else (stretched, resolution)
    image = image.resize(size, Image.Resampling.BICUBIC)
    margin = (stretched - resolution) // 2
    left, top = (0, margin) if size[0] == resolution else (margin, 0)
    return np.array(image.crop((left, top, left + resolution, top + resolution)))


@pytest.mark.parametrize("resolution", [64, 256, 512])
@pytest.mark.parametrize(
    "package, name", [(p, name) for p in PHOTOGRAPHS for name in PHOTOGRAPHS[p]]
)
def test_photographs_are_cropped_as_described(package, name, resolution):
    path = photograph(package, name)
    got = center_crop(path.read_bytes(), resolution, name)
    assert got.dtype == np.uint8 and got.shape == (resolution, resolution, 3)
    assert got.flags.c_contiguous and got.flags.writeable
    assert np.array_equal(got, described(path, resolution))


def test_the_odd_pixel_is_cut_at_the_right_and_the_bottom():
    for height, width, left, top in ((8, 13, 2, 0), (8, 12, 2, 0), (13, 8, 0, 2), (9, 8, 0, 0)):
        whole = rgb(height, width)
        assert np.array_equal(center_crop(saved(whole), 8), whole[top : top + 8, left : left + 8])


def test_halving_is_for_twice_the_resolution_and_none_for_the_resolution_itself():
    """Means of two columns, then of two rows, halves rounded up each time."""
    same, twice, below = rgb(48, 48), rgb(16, 16), rgb(15, 15)
    assert np.array_equal(center_crop(saved(same), 48), same)
    columns = (twice[:, 0::2].astype(int) + twice[:, 1::2] + 1) // 2
    assert np.array_equal(center_crop(saved(twice), 8), (columns[0::2] + columns[1::2] + 1) // 2)
    expected = Image.fromarray(below).resize((8, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(center_crop(saved(below), 8), np.asarray(expected))


def test_the_long_side_goes_to_the_nearest_pixel():
    """16 x 27 to 10 pixels is 10 x 16.875: as 17, three are cut at the left; as 16, also three,
    but other pixels."""
    whole = rgb(16, 27)
    expected = Image.fromarray(whole).resize((17, 10), Image.Resampling.BICUBIC)
    assert np.array_equal(center_crop(saved(whole), 10), np.asarray(expected)[:, 3:13])


def test_jpeg_keeps_chroma_at_full_resolution_and_quality_counts():
    crop = center_crop(photograph("sklearn", "china.jpg").read_bytes(), 256)
    sizes, errors = [], []
    for quality in (75, 95):
        data = encode(crop, "jpeg", quality)
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == "JPEG" and image.mode == "RGB"
            assert [component[1:3] for component in image.layer] == [(1, 1)] * 3
        sizes.append(len(data))
        errors.append(
            np.abs(dataset.decode(data, 256).astype(int) - crop.transpose(2, 0, 1)).mean()
        )
    assert sizes[0] < sizes[1] and errors[1] < errors[0] < 5
    assert encode(crop, "jpeg") == encode(crop, "jpeg", 95)


@pytest.mark.parametrize(
    "array, options, words",
    [
        (rgb(8, 8), {"kind": "gif"}, "kind is 'gif', expected 'jpeg' or 'png'"),
        (rgb(8, 8), {"kind": "jpeg", "quality": 0}, r"quality is 0, expected 1\.\.100"),
        (rgb(8, 8).astype(np.float32), {}, r"float32 \(8, 8, 3\), expected uint8"),
        (rgb(8, 8).transpose(2, 0, 1), {}, r"uint8 \(3, 8, 8\), expected uint8 \(R, R, 3\)"),
    ],
)
def test_what_cannot_be_encoded_is_refused(array, options, words):
    refused(lambda: encode(array, **options), words)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_original_is_kept_to_the_byte_and_reads_as_its_crop(kind, mode):
    data = saved(Image.fromarray(rgb(16, 16)).convert(mode), kind)
    assert original(data, 16, "a") is data
    assert np.array_equal(dataset.decode(data, 16), center_crop(data, 16).transpose(2, 0, 1))


NO_ORIGINALS = [
    (saved(rgb(16, 17)), "is 17x16, expected 16x16"),
    (saved(Image.fromarray(rgb(16, 16)), "WEBP"), "is WEBP, expected JPEG or PNG"),
    (saved(Image.new("CMYK", (16, 16)), "JPEG"), "has mode CMYK, expected RGB or L"),
    (saved(Image.new("RGBA", (16, 16)), "PNG"), "has mode RGBA, expected RGB or L"),
    (turned(rgb(), "JPEG"), "has EXIF orientation 6, expected 1"),
    (b"text", "is not an image"),
    (b"", "is empty"),
]


@pytest.mark.parametrize("data, words", NO_ORIGINALS, ids=[words for _, words in NO_ORIGINALS])
def test_an_original_that_readers_disagree_about_is_refused(data, words):
    refused(lambda: original(data, 16, "a.jpg"), rf"^a\.jpg: {words}")
