"""What the registry says of the encoders is what timm's architectures are."""

from pathlib import Path

import pytest
import torch

from repa_fast import encoders
from repa_fast.encoders.recipes import DINOV2, RECIPES
from repa_fast.encoders.registry import REGISTRY
from repa_fast.encoders.vit import FrozenViT

MOCO_HEADS = {"mocov3-vit-s": 12, "mocov3-vit-b": 12, "mocov3-vit-l": 16}
EVERY = (*DINOV2, *RECIPES)
SIZES = [  # building a large one takes seconds, even without its memory
    pytest.param(recipe, id=recipe.name, marks=[pytest.mark.heavy] if recipe.depth > 12 else [])
    for recipe in EVERY
]


@pytest.mark.parametrize("recipe", SIZES)
def test_they_are_as_large_as_timms(recipe):
    timm = pytest.importorskip("timm")
    spec = encoders.spec(recipe.name)
    for size in spec.input_sizes.values():
        assert timm.is_model(recipe.model.format(size=size).partition(".")[0])
    resolution, size = max(spec.input_sizes.items())
    with torch.device("meta"):
        vit = FrozenViT(recipe, size, pretrained=False).vit
    assert spec.num_tokens(resolution) == vit.patch_embed.num_patches
    assert (spec.width, spec.depth) == (vit.embed_dim, len(vit.blocks))
    assert (spec.patch_size, spec.patch_size) == tuple(vit.patch_embed.patch_size)
    assert spec.prefix == vit.num_prefix_tokens
    heads = MOCO_HEADS.get(recipe.name)  # timm knows those of the others
    assert recipe.options.get("num_heads") == heads
    assert heads in (None, vit.blocks[0].attn.num_heads)
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


@pytest.mark.parametrize("name, infix", [("dinov2-vit-s", ""), ("dinov2reg-vit-s", "reg4_")])
def test_files_of_dinov2_have_their_published_names(name, infix):
    recipe = encoders.spec(name)
    assert recipe.model == f"vit_small_patch14_{infix}dinov2.lvd142m"
    assert recipe.file == f"dinov2_vits14_{infix}pretrain.pth of facebookresearch/dinov2"


@pytest.mark.parametrize(
    "name, gmac, tolerance",
    [("dinov2-vit-b", 23, 0.03), ("dinov1-vit-b", 23, 0.04), ("clip-vit-L", 81, 0.04)],
)
def test_the_cost_of_the_known_ones(name, gmac, tolerance):
    """Per image of a plain ViT at 256 tokens."""
    assert encoders.spec(name).flops(256) == pytest.approx(2e9 * gmac, rel=tolerance)


def test_the_documentation_has_them_all():
    text = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()]
    rows = {row[0].strip("`"): row[2:] for row in cells if len(row) == 6}
    for name, spec in REGISTRY.items():
        if name != "digits-vit":
            at_256 = str(spec.num_tokens(256))
            at_512 = str(spec.num_tokens(512)) if 512 in spec.input_sizes else "-"
            sizes = " / ".join(map(str, spec.input_sizes.values()))
            assert rows.get(name) == [str(spec.width), at_256, at_512, sizes], name
    assert set(rows) == set(REGISTRY) - {"digits-vit"} | {"name", "---"}
