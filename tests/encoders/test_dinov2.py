"""DINOv2 through timm: shapes, REPA's preprocessing, and a clear error without the weights."""

import pytest
import torch
import torch.nn.functional as F

from repa_fast import encoders
from repa_fast.encoders.recipes import dinov2
from repa_fast.encoders.vit import FrozenViT

timm = pytest.importorskip("timm")

SMALL = "vit_small_patch14_dinov2.lvd142m"


def dinov2_vit(letter: str, registers: bool, *args, **options) -> FrozenViT:
    return FrozenViT(dinov2(letter, registers), *args, **options)


@pytest.fixture(scope="module")
def encoder() -> FrozenViT:
    torch.manual_seed(0)
    return dinov2_vit("s", False, 224, pretrained=False)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8, generator=generator)


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)
    scaled = images.permute(0, 2, 3, 1).double() / 255
    return ((scaled - mean) / std).permute(0, 3, 1, 2)


def bicubic(x: torch.Tensor, side: int, antialias: bool = False) -> torch.Tensor:
    return F.interpolate(x, (side, side), mode="bicubic", antialias=antialias, align_corners=False)


def input_of(encoder: FrozenViT, images: torch.Tensor, monkeypatch) -> torch.Tensor:
    """What the encoder feeds its network."""
    seen = []
    forward = encoder.vit.forward_features

    def record(x, *rest, **options):
        seen.append(x)
        return forward(x, *rest, **options)

    monkeypatch.setattr(encoder.vit, "forward_features", record)
    encoder(images)
    monkeypatch.undo()
    (x,) = seen
    return x


def test_tokens_are_a_grid_of_patches(encoder, images):
    tokens = encoder(images)
    assert tokens.shape == (2, 256, 384) and tokens.dtype == torch.float32


def test_the_registry_knows_its_shape(encoder, images):
    spec = encoders.spec("dinov2-vit-s")
    assert encoder(images).shape[1:] == (spec.num_tokens(256), spec.width)


def test_the_module_is_frozen(encoder, images):
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(images).requires_grad


def test_images_are_normalised_then_resized_without_antialias(encoder, images, monkeypatch):
    x = input_of(encoder, images, monkeypatch)
    expected = bicubic(normalised(images).float(), 224)
    error = (x - expected).abs().max()
    assert x.shape == (2, 3, 224, 224)
    assert error < 1e-5
    antialiased = bicubic(normalised(images).float(), 224, antialias=True)
    quantised = normalised(bicubic(images.float(), 224).round().clamp(0, 255))
    assert (antialiased - expected).abs().max() > 1000 * error
    assert (quantised - expected).abs().max() > 1000 * error


def test_tokens_are_those_of_timm_after_the_final_norm(encoder, images):
    with torch.no_grad():
        features = encoder.vit.forward_intermediates(
            bicubic(normalised(images).float(), 224), indices=1, norm=True, output_fmt="NLC"
        )
    expected = features[1][-1]
    assert torch.allclose(encoder(images), expected, rtol=0, atol=1e-4)


def test_tokens_are_in_row_major_order(encoder, images):
    changed = images.clone()
    side = 256 // 16  # pixels of the image under one patch
    changed[..., 3 * side : 4 * side, 9 * side : 10 * side] ^= 255
    moved = (encoder(changed) - encoder(images)).norm(dim=-1).mean(0)
    assert moved.argmax().item() == 3 * 16 + 9


def test_class_and_register_tokens_are_dropped(images):
    torch.manual_seed(0)
    encoder = dinov2_vit("s", True, 224, pretrained=False)
    with torch.no_grad():
        whole = encoder.vit.forward_features(bicubic(normalised(images).float(), 224))
    assert whole.shape == (2, 5 + 256, 384)
    tokens = encoder(images)
    assert tokens.shape == (2, 256, 384)
    assert torch.allclose(tokens, whole[:, 5:], rtol=0, atol=1e-4)


def test_512_pixels_give_a_grid_of_32():
    encoder = dinov2_vit("s", False, 448, pretrained=False)
    images = torch.zeros(1, 3, 512, 512, dtype=torch.uint8)
    assert encoder(images).shape == (1, 32 * 32, 384)


@pytest.mark.parametrize(
    "registers, hub, file",
    [
        (False, SMALL, "dinov2_vits14_pretrain.pth"),
        (True, "vit_small_patch14_reg4_dinov2.lvd142m", "dinov2_vits14_reg4_pretrain.pth"),
    ],
)
def test_without_the_weights_the_error_says_what_to_do(monkeypatch, registers, hub, file):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(RuntimeError, match=f"timm/{hub}") as caught:
        dinov2_vit("s", registers, 224)
    message = str(caught.value)
    assert "cache" in message and "fetched" in message
    assert f"--enc-weights FILE, where FILE is {file} of facebookresearch/dinov2" in message
    assert isinstance(caught.value.__cause__, OSError)


def test_attention_is_the_fused_one(encoder):
    assert all(block.attn.fused_attn for block in encoder.vit.blocks)


def test_it_compiles_as_one_graph_and_follows_autocast(encoder, images):
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tokens, expected = compiled(images), encoder(images)
    assert torch.equal(tokens, expected)
    exact = encoder(images)
    error = ((expected - exact).norm() / exact.norm()).item()
    assert 2**-12 < error < 2**-4  # of bf16, not of fp32
