"""What the registry says of encoders is what the modules do."""

import pytest
import torch

from repa_fast import encoders
from repa_fast.encoders.registry import REGISTRY

DINOV2 = {"s": ("small", 384, 12), "b": ("base", 768, 12), "l": ("large", 1024, 24)}
DINOV2 |= {"g": ("giant", 1536, 40)}


@pytest.mark.parametrize("name", ["none", "None", "NONE"])
def test_none_is_no_encoder(name):
    assert encoders.specs(name) == []


@pytest.mark.parametrize("text", ["dinov2-vit-b,digits-vit", "dinov2-vit-b, digits-vit"])
def test_a_list_keeps_its_order(text):
    assert [spec.name for spec in encoders.specs(text)] == ["dinov2-vit-b", "digits-vit"]


@pytest.mark.parametrize("text", ["dino9", "", "digits-vit,", "digits-vit,none", "DINOV2-vit-b"])
def test_an_unknown_name_is_refused(text):
    with pytest.raises(ValueError, match=r"encoder is '.*', expected one of .*dinov2-vit-b"):
        encoders.specs(text)


@pytest.mark.parametrize("kind", ["dinov2", "dinov2reg"])
@pytest.mark.parametrize("letter", DINOV2)
def test_the_official_names_of_dinov2_are_known(kind, letter):
    spec = encoders.spec(f"{kind}-vit-{letter}")
    _, width, depth = DINOV2[letter]
    assert (spec.width, spec.depth, spec.patch_size) == (width, depth, 14)
    assert spec.prefix == (5 if kind == "dinov2reg" else 1)
    assert (spec.input_size(256), spec.input_size(512)) == (224, 448)
    assert (spec.num_tokens(256), spec.num_tokens(512)) == (16 * 16, 32 * 32)


@pytest.mark.parametrize("kind, suffix", [("dinov2", "dinov2"), ("dinov2reg", "reg4_dinov2")])
@pytest.mark.parametrize("letter", DINOV2)
def test_dinov2_is_as_large_as_timms(kind, suffix, letter):
    timm = pytest.importorskip("timm")
    size = DINOV2[letter][0]
    with torch.device("meta"):
        vit = timm.create_model(
            f"vit_{size}_patch14_{suffix}.lvd142m", pretrained=False, img_size=224, num_classes=0
        )
    spec = encoders.spec(f"{kind}-vit-{letter}")
    assert (spec.width, spec.depth) == (vit.embed_dim, len(vit.blocks))
    assert (spec.patch_size, spec.patch_size) == tuple(vit.patch_embed.patch_size)
    assert spec.prefix == vit.num_prefix_tokens
    assert spec.num_tokens(256) == vit.patch_embed.num_patches


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_a_resolution_without_an_input_size_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name}: resolution is 100, expected"):
        encoders.spec(name).num_tokens(100)
    with pytest.raises(ValueError, match=rf"{name}: resolution is 100, expected"):
        encoders.load(name, 100, "cpu")


def test_the_digits_encoder_gives_the_tokens_it_promises():
    pytest.importorskip("timm")
    spec = encoders.spec("digits-vit")
    module = encoders.load("digits-vit", 16, "cpu")
    tokens = module(torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8))
    assert tokens.shape == (3, spec.num_tokens(16), spec.width)
    assert len(module.vit.blocks) == spec.depth
    assert module.vit.patch_embed.patch_size == (spec.patch_size,) * 2
    assert module.vit.num_prefix_tokens == spec.prefix


def test_a_loaded_encoder_is_frozen():
    pytest.importorskip("timm")
    module = encoders.load("digits-vit", 16, "cpu")
    assert not any(part.training for part in module.modules())
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_dinov2_b_costs_what_is_known():
    """About 23 GMAC at 224 pixels."""
    assert encoders.spec("dinov2-vit-b").flops(256) == pytest.approx(2 * 23e9, rel=0.03)


@pytest.mark.parametrize(
    "enc_type, files, expected",
    [
        ("none", "", []),
        ("dinov2-vit-b", "", [""]),
        ("dinov2-vit-b", "b.pth", ["b.pth"]),
        ("dinov2-vit-b,dinov2-vit-l", "b.pth, l.pth", ["b.pth", "l.pth"]),
        ("digits-vit,dinov2-vit-l", ",l.pth", ["", "l.pth"]),
    ],
)
def test_weight_files_go_with_their_encoders(enc_type, files, expected):
    assert encoders.weight_files(enc_type, files) == expected


@pytest.mark.parametrize(
    "enc_type", ["none", "dinov2-vit-b", "dinov2-vit-s,dinov2-vit-b,dinov2-vit-l"]
)
def test_as_many_weight_files_as_encoders(enc_type):
    with pytest.raises(ValueError, match=rf"2 entries \(a.pth,b.pth\), expected \d.*{enc_type}"):
        encoders.weight_files(enc_type, "a.pth,b.pth")


def test_a_file_for_an_encoder_that_brings_its_own_is_refused():
    with pytest.raises(ValueError, match=r"digits-vit brings its weights.*got some\.pth"):
        encoders.load("digits-vit", 16, "cpu", "some.pth")


def test_an_encoder_can_be_named_once_only():
    with pytest.raises(ValueError, match="expected each encoder once"):
        encoders.specs("digits-vit,digits-vit")
