"""DALI's pixels are Pillow's, or it leaves the image to Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from repa_fast.data import dali, dataset
from repa_fast.data.dali import GPU_MAX, GPU_MEAN, TOKEN_COSINE, DaliDecoder, well_formed
from repa_fast.data.loader import read_batch
from tests.data.encoding import R, assert_equal_batches, encode, noise, unusual, usual, write_table

pytest.importorskip("lance")

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def photographs():
    """uint8 (256, 256, 3) each: a part of a photograph, and most of it."""
    samples = pytest.importorskip("sklearn.datasets").load_sample_images().images
    parts = [photo[100:356, 200:456] for photo in samples]
    wholes = [np.asarray(Image.fromarray(photo).resize((256, 256))) for photo in samples]
    return parts + wholes


def jpegs(photographs) -> list[bytes]:
    """Every quality and chroma (4:4:4, 4:2:2, 4:2:0) that the module's docstring speaks of."""
    kinds = [(q, chroma, False) for q in (50, 75, 90, 95, 100) for chroma in (0, 1, 2)]
    return [
        encode(photo, "JPEG", quality=quality, subsampling=chroma, progressive=progressive)
        for photo in photographs
        for quality, chroma, progressive in (*kinds, (90, 2, True))
    ]


def by_pillow(encoded: list[bytes], resolution: int = 256) -> torch.Tensor:
    return torch.from_numpy(np.stack([dataset.decode(data, resolution) for data in encoded]))


def by_dali(encoded: list[bytes], device: torch.device | None = None, resolution: int = 256):
    with DaliDecoder(resolution, 2, device) as decoder:
        return decoder.pixels(encoded)


def test_png_and_jpeg_on_the_cpu_are_equal(with_dali, photographs):
    encoded = [encode(photo) for photo in photographs] + jpegs(photographs)
    pixels, expected = by_dali(encoded), by_pillow(encoded)
    assert pixels.dtype == torch.uint8 and pixels.stride() == expected.stride()
    assert torch.equal(pixels, expected)


def test_kinds_that_dali_decodes_are_equal(with_dali):
    encoded = usual(noise())
    for data in encoded:
        dali.expect_usual(data, R, "image")
    assert torch.equal(by_dali(encoded, resolution=R), by_pillow(encoded, R))


@pytest.mark.parametrize("kind", list(unusual(noise())))
def test_other_kinds_are_left_to_pillow_and_logged(with_dali, tmp_path, caplog, kind):
    odd = write_table(tmp_path / "a.lance", {2: unusual(noise())[kind]})
    with DaliDecoder(R, 1, None) as decoder:
        for indices in (np.arange(4), np.arange(4, 8)):
            batch = read_batch(odd, indices, decoder=decoder, skipped=[])
            assert_equal_batches(batch, read_batch(odd, indices))
    assert len(caplog.records) == 1 and "decoded by Pillow" in caplog.text


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("trials", [60, pytest.param(300, marks=pytest.mark.heavy)])
def test_damage_is_never_painted_over(with_dali, kind, trials):
    whole = encode(noise(), kind, **({"quality": 95} if kind == "JPEG" else {}))
    random = np.random.default_rng(0)
    decoder, refused = DaliDecoder(R, 1, None), 0
    for trial in range(trials):
        data = bytearray(whole)
        start, length = random.integers(len(data)), random.integers(1, 20)
        if trial % 3 == 0:
            del data[start:]
        else:
            data[start : start + length] = random.bytes(len(data[start : start + length]))
        try:
            dali.expect_usual(bytes(data), R, "image")
            pixels = decoder.pixels([bytes(data)])[0]
        except ValueError:
            refused += 1
            continue
        assert np.array_equal(pixels, dataset.decode(bytes(data), R))
    assert refused >= trials / 3


def test_a_marker_in_a_scan_is_seen():
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 1}):
        data = encode(noise(), "JPEG", **options)
        assert well_formed(data)
        assert not well_formed(data[:-2]) and not well_formed(data + b"\0")
        for marker in (b"\xff\xd9", b"\xff\xe1", b"\xff\x02"):
            assert not well_formed(data[:-20] + marker + data[-18:])


def lowest_cosine(pixels: torch.Tensor, expected: torch.Tensor) -> float:
    """Of all tokens of a random ViT of patches of 16, which stand for DINO's."""
    timm = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    net = timm.VisionTransformer(256, embed_dim=96, depth=3, num_heads=3, num_classes=0)
    net = net.to(pixels.device).eval()
    with torch.no_grad():
        a, b = (net.forward_features(x.float() / 127.5 - 1) for x in (pixels, expected))
    return float(cosine_similarity(a.double(), b.double(), dim=-1).min())


def test_tokens_agree(with_dali, photographs):
    encoded = [encode(photo, "JPEG", quality=95, subsampling=0) for photo in photographs[1:3]]
    expected = by_pillow(encoded)
    assert lowest_cosine(by_dali(encoded), expected) >= TOKEN_COSINE
    shaken = expected + torch.randint(-2, 3, expected.shape)
    assert lowest_cosine(shaken.clamp(0, 255), expected) >= TOKEN_COSINE
    assert lowest_cosine(expected.roll(1, -1), expected) < TOKEN_COSINE


@pytest.mark.gpu
def test_on_a_gpu_png_is_equal(with_dali, photographs):
    encoded = [encode(photo) for photo in photographs] + usual(photographs[0])[:7]
    pixels = by_dali(encoded, CUDA)
    assert pixels.is_cuda and pixels.dtype == torch.uint8
    assert torch.equal(pixels.cpu(), by_pillow(encoded))


@pytest.mark.gpu
def test_on_a_gpu_jpeg_is_within_its_bounds(with_dali, photographs):
    encoded = jpegs(photographs)
    expected = by_pillow(encoded)
    pixels = by_dali(encoded, CUDA).cpu()
    error = (pixels.int() - expected.int()).abs().double()
    each = error.mean((1, 2, 3))
    assert error.max() <= GPU_MAX and each.max() <= GPU_MEAN, (error.max(), each)
    part = slice(0, None, 8)
    assert lowest_cosine(pixels[part].cuda(), expected[part].cuda()) >= TOKEN_COSINE
