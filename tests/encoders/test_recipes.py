"""What the registry says of the encoders is what timm's architectures are."""

from pathlib import Path

import pytest
import torch

from repa_fast import encoders
from repa_fast.encoders.recipes import DINOV2, RECIPES
from repa_fast.encoders.registry import REGISTRY
from repa_fast.encoders.vit import FrozenViT

KNOWN = {  # width, depth, heads, patch, class and register tokens, input at 256 and at 512
    "dinov1-vit-b": (768, 12, 12, 16, 1, 256, None),
    "dinov2-vit-s": (384, 12, 6, 14, 1, 224, 448),
    "dinov2-vit-b": (768, 12, 12, 14, 1, 224, 448),
    "dinov2-vit-l": (1024, 24, 16, 14, 1, 224, 448),
    "dinov2-vit-g": (1536, 40, 24, 14, 1, 224, 448),
    "dinov2reg-vit-s": (384, 12, 6, 14, 5, 224, 448),
    "dinov2reg-vit-b": (768, 12, 12, 14, 5, 224, 448),
    "dinov2reg-vit-l": (1024, 24, 16, 14, 5, 224, 448),
    "dinov2reg-vit-g": (1536, 40, 24, 14, 5, 224, 448),
    "mocov3-vit-s": (384, 12, 12, 16, 1, 256, None),
    "mocov3-vit-b": (768, 12, 12, 16, 1, 256, None),
    "mocov3-vit-l": (1024, 24, 16, 16, 1, 256, None),
    "mae-vit-l": (1024, 24, 16, 16, 1, 256, None),
    "clip-vit-L": (1024, 24, 16, 14, 1, 224, None),
    "jepa-vit-h": (1280, 32, 16, 14, 0, 224, None),
    "dinov3-vit-s": (384, 12, 6, 16, 5, 256, 512),
    "dinov3-vit-splus": (384, 12, 6, 16, 5, 256, 512),
    "dinov3-vit-b": (768, 12, 12, 16, 5, 256, 512),
    "dinov3-vit-l": (1024, 24, 16, 16, 5, 256, 512),
    "dinov3-vit-hplus": (1280, 32, 20, 16, 5, 256, 512),
    "siglip2-vit-b": (768, 12, 12, 16, 0, 256, 512),
    "siglip2-vit-l": (1024, 24, 16, 16, 0, 256, 512),
    "siglip2-vit-so400m": (1152, 27, 16, 16, 0, 256, 512),
    "siglip2-vit-g": (1536, 40, 16, 16, 0, 256, None),
}
EVERY = (*DINOV2, *RECIPES)
SIZES = [  # building a large one takes seconds, even without its memory
    pytest.param(recipe, id=recipe.name, marks=[pytest.mark.heavy] if recipe.depth > 12 else [])
    for recipe in EVERY
]


def test_all_are_known():
    assert {recipe.name for recipe in EVERY} == set(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_the_registry_knows_them(name):
    spec = encoders.spec(name)
    width, depth, _, patch, prefix, at_256, at_512 = KNOWN[name]
    assert (spec.width, spec.depth, spec.patch_size, spec.prefix) == (width, depth, patch, prefix)
    assert spec.input_size(256) == at_256 and spec.num_tokens(256) == 256
    if at_512:
        assert spec.input_size(512) == at_512 and spec.num_tokens(512) == 1024
        return
    for refused in (
        spec.num_tokens,
        spec.input_size,
        lambda size: encoders.load(name, size, "cpu"),
    ):
        with pytest.raises(ValueError, match=rf"{name}: resolution is 512, expected 256$"):
            refused(512)


@pytest.mark.parametrize("recipe", SIZES)
def test_they_are_as_large_as_timms(recipe):
    timm = pytest.importorskip("timm")
    spec = encoders.spec(recipe.name)
    _, _, heads, *_ = KNOWN[recipe.name]
    for resolution, size in spec.input_sizes.items():
        assert timm.is_model(recipe.model.format(size=size).partition(".")[0])
        with torch.device("meta"):
            vit = FrozenViT(recipe, size, pretrained=False).vit
        assert (spec.width, spec.depth) == (vit.embed_dim, len(vit.blocks))
        assert (spec.patch_size, spec.patch_size) == tuple(vit.patch_embed.patch_size)
        assert spec.prefix == vit.num_prefix_tokens
        assert spec.num_tokens(resolution) == vit.patch_embed.num_patches
        assert {block.attn.num_heads for block in vit.blocks} == {heads}
        assert isinstance(vit.head, torch.nn.Identity)
        assert isinstance(vit.norm, torch.nn.Identity) == (not recipe.final_norm)
        mlp = sum(weight.numel() for weight in vit.blocks[0].mlp.parameters() if weight.ndim == 2)
        assert mlp == 2 * recipe.mlp_ratio * spec.width**2


@pytest.mark.parametrize("recipe", EVERY, ids=lambda recipe: recipe.name)
def test_channels_are_those_timm_knows(recipe):
    timm = pytest.importorskip("timm")
    config = timm.get_pretrained_cfg(recipe.model.format(size=recipe.input_sizes[256]))
    if recipe.hub:
        assert (config.mean, config.std) == (recipe.mean, recipe.std)
        assert config.hf_hub_id or config.url
    else:
        assert recipe.mean == (0.485, 0.456, 0.406) and recipe.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    "name, model, file",
    [
        ("dinov2-vit-s", "vit_small_patch14_dinov2.lvd142m", "dinov2_vits14_pretrain.pth"),
        (
            "dinov2reg-vit-s",
            "vit_small_patch14_reg4_dinov2.lvd142m",
            "dinov2_vits14_reg4_pretrain.pth",
        ),
    ],
)
def test_files_of_dinov2_have_their_published_names(name, model, file):
    recipe = encoders.spec(name)
    assert recipe.model == model and recipe.file == f"{file} of facebookresearch/dinov2"


@pytest.mark.parametrize(
    "enc_type, widths",
    [
        ("dinov1-vit-b,mocov3-vit-l,mae-vit-l", [768, 1024, 1024]),
        ("dinov2-vit-b, clip-vit-L", [768, 1024]),
        ("jepa-vit-h,dinov3-vit-b,siglip2-vit-so400m", [1280, 768, 1152]),
    ],
)
def test_combinations_keep_their_order_and_agree_on_the_tokens(enc_type, widths):
    specs = encoders.specs(enc_type)
    assert [spec.width for spec in specs] == widths
    assert {spec.num_tokens(256) for spec in specs} == {256}
    assert encoders.weight_files(enc_type, "") == [""] * len(widths)


@pytest.mark.parametrize(
    "name, gmac, tolerance",
    [
        ("dinov2-vit-b", 23, 0.03),
        ("dinov1-vit-b", 23, 0.04),
        ("mae-vit-l", 81, 0.04),
        ("clip-vit-L", 81, 0.04),
    ],
)
def test_the_cost_of_the_known_ones(name, gmac, tolerance):
    """Per image of a plain ViT at 256 tokens."""
    assert encoders.spec(name).flops(256) == pytest.approx(2e9 * gmac, rel=tolerance)


def test_the_documentation_has_them_all():
    text = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()]
    rows = {row[0].strip("`"): row[2:] for row in cells if len(row) == 6}
    for name, spec in REGISTRY.items():
        if name == "digits-vit":
            continue
        at_512 = str(spec.num_tokens(512)) if 512 in spec.input_sizes else "-"
        sizes = " / ".join(map(str, spec.input_sizes.values()))
        assert rows.get(name) == [str(spec.width), "256", at_512, sizes], name
    names = set(REGISTRY) - {"digits-vit"} | {"name", "---"}
    assert set(rows) == names
