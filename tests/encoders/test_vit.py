"""Encoders from official files, against plain forward passes written from the official code."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from repa_fast.encoders.recipes import RECIPES
from repa_fast.encoders.vit import FrozenViT
from repa_fast.testing import assert_within_budget
from tests.encoders.plain import (
    IMAGENET,
    OFFICIAL,
    OPENAI,
    clip_state,
    dino_checkpoint,
    facebook,
    gelu,
    moco_checkpoint,
    official_tokens,
    pictures,
    prepared,
    random_weights,
    small,
    tanh_gelu,
)

timm = pytest.importorskip("timm")


def loaded(tmp_path, name, kind, weights, resolution=256, depth=2, layout=None) -> FrozenViT:
    recipe = small(name, depth)
    path = tmp_path / "weights.pth"
    torch.save((layout or kind.layout)(weights), path)
    return FrozenViT(recipe, recipe.input_sizes[resolution], str(path))


def assert_official(encoder, kind, weights, resolution=256) -> None:
    images = pictures(resolution)
    oracle, working = (
        official_tokens(kind, weights, images, dtype) for dtype in (torch.float64, torch.float32)
    )
    assert_within_budget("patch tokens", encoder(images), oracle, working)


def rounded(kind, weights):
    """CLIP's files are in half precision."""
    if kind.layout is clip_state:
        return {name: value.half().float() for name, value in weights.items()}
    return weights


@pytest.mark.parametrize("name", OFFICIAL)
def test_an_official_file_gives_the_official_tokens(tmp_path, name):
    kind = OFFICIAL[name]
    weights = rounded(kind, random_weights(kind))
    encoder = loaded(tmp_path, name, kind, weights)
    tokens = encoder(pictures(256))
    assert tokens.shape == (2, 256, 48) and tokens.dtype == torch.float32
    assert_official(encoder, kind, weights)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("dinov1-vit-b", {"eps": 1e-5}),
        ("dinov1-vit-b", {"final_norm": False}),
        ("mae-vit-l", {"final_norm": True}),
        ("clip-vit-L", {"activation": gelu}),
        ("clip-vit-L", {"eps": 1e-6}),
        ("clip-vit-L", {"channels": IMAGENET, "resized_to": 224}),
        ("jepa-vit-h", {"resized_to": 224, "channels": ((0.5,) * 3, (0.5,) * 3)}),
        ("jepa-vit-h", {"eps": 1e-5}),
        ("dinov3-vit-b", {"eps": 1e-6}),
        ("dinov3-vit-b", {"activation": tanh_gelu}),
        ("siglip2-vit-b", {"activation": gelu}),
        ("siglip2-vit-b", {"channels": IMAGENET}),
    ],
)
def test_another_choice_would_show(tmp_path, name, wrong):
    kind = OFFICIAL[name]
    weights = rounded(kind, random_weights(kind))
    encoder = loaded(tmp_path, name, kind, weights)
    with pytest.raises(AssertionError, match="of the error is"):
        assert_official(encoder, replace(kind, **wrong), weights)


def test_the_periods_of_dinov3_are_those_of_the_file(tmp_path):
    kind = OFFICIAL["dinov3-vit-b"]
    weights = random_weights(kind)
    encoder = loaded(tmp_path, "dinov3-vit-b", kind, weights)
    exact = weights | {"periods": 100 ** (torch.arange(4, dtype=torch.float64) / 4)}
    with pytest.raises(AssertionError, match="of the error is"):
        assert_official(encoder, kind, exact)


@pytest.mark.parametrize("name, grid", [("dinov3-vit-b", 0), ("siglip2-vit-b", 32)])
def test_at_512_pixels(tmp_path, name, grid):
    kind = replace(OFFICIAL[name], table=grid)
    weights = random_weights(kind)
    encoder = loaded(tmp_path, name, kind, weights, resolution=512)
    assert encoder(pictures(512)).shape == (2, 1024, 48)
    assert_official(encoder, kind, weights, resolution=512)


def test_the_slips_in_the_names_of_moco_v3_l(tmp_path):
    kind = OFFICIAL["mocov3-vit-l"]
    weights = random_weights(kind, depth=15)
    content = moco_checkpoint(weights)["state_dict"]
    assert "module.base_encoder.blocks.14.mlp.fc14.weight" in content
    assert_official(loaded(tmp_path, "mocov3-vit-l", kind, weights, depth=15), kind, weights)


@pytest.mark.parametrize("name", ["dinov1-vit-b", "mocov3-vit-b", "mae-vit-l"])
@pytest.mark.parametrize("grid", [14, 16])
def test_the_position_table_is_resampled_as_upstream(tmp_path, name, grid):
    """REPA calls timm's resampling: bicubic with antialias, whose kernel is another one."""
    kind = replace(OFFICIAL[name], table=grid)
    weights = random_weights(kind)
    encoder = loaded(tmp_path, name, kind, weights)
    own = weights["table"][1:].T.unflatten(1, (grid, grid))[None]
    smooth, sharp = (
        F.interpolate(own, (16, 16), mode="bicubic", antialias=antialias)[0].flatten(1).T
        for antialias in (True, False)
    )
    table = encoder.vit.pos_embed[0]
    assert torch.equal(table[0], weights["table"][0])
    assert torch.allclose(table[1:], smooth, rtol=0, atol=1e-6)
    assert grid == 16 or (smooth - sharp).abs().max() > 1e-3
    assert_official(encoder, kind, weights)


def test_the_teacher_of_a_dino_checkpoint(tmp_path):
    kind = OFFICIAL["dinov1-vit-b"]
    weights = random_weights(kind)
    encoder = loaded(tmp_path, "dinov1-vit-b", kind, weights, layout=dino_checkpoint)
    assert_official(encoder, kind, weights)


def test_the_context_encoder_of_ijepa_goes_before_the_target(tmp_path):
    kind = OFFICIAL["jepa-vit-h"]
    weights = random_weights(kind)

    def only_target(weights):
        content = kind.layout(weights)
        return {"target_encoder": content["encoder"], "epoch": 300}

    assert_official(loaded(tmp_path, "jepa-vit-h", kind, weights), kind, weights)
    encoder = loaded(tmp_path, "jepa-vit-h", kind, weights, layout=only_target)
    assert_official(encoder, kind, weights)


def test_dinov3_without_biases_or_periods(tmp_path):
    """As timm's files have it: the periods follow from the width of a head."""
    kind = OFFICIAL["dinov3-vit-b"]
    weights = random_weights(kind)
    for block in range(2):
        weights[f"{block}.qkv.bias"] = torch.zeros(3 * 48)
    weights["periods"] = 100 ** (torch.arange(4, dtype=torch.float64) / 4)

    def bare(weights):
        left_out = ("qkv.bias", "bias_mask", "periods")
        return {k: v for k, v in kind.layout(weights).items() if not k.endswith(left_out)}

    encoder = loaded(tmp_path, "dinov3-vit-b", kind, weights, layout=bare)
    assert_official(encoder, kind, weights)


@pytest.mark.parametrize(
    "name, suffix",
    [("dinov1-vit-b", "pth")]
    + [(name, "safetensors") for name in OFFICIAL if not name.startswith("mocov3")],
)
def test_a_file_of_timm_gives_the_same_tokens(tmp_path, name, suffix):
    from safetensors.torch import save_file

    recipe = small(name)
    model = recipe.model.format(size=recipe.input_sizes[256])
    torch.manual_seed(0)
    vit = timm.create_model(
        model, img_size=recipe.input_sizes[256], num_classes=5, **recipe.options
    ).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    state = {name: v for name, v in vit.state_dict().items() if not name.startswith("head.")}
    if name == "clip-vit-L":  # whose files on the hub have the projection
        state = vit.state_dict()
    path = tmp_path / f"timm.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    encoder = FrozenViT(recipe, recipe.input_sizes[256], str(path))
    x = prepared(OFFICIAL[name], pictures(256), torch.float32)
    if not recipe.final_norm:
        vit.norm = torch.nn.Identity()
    with torch.no_grad():
        expected = vit.forward_features(x)[:, vit.num_prefix_tokens :]
    assert torch.allclose(encoder(pictures(256)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in OFFICIAL if not name.startswith("mocov3")])
def test_what_timm_fetches_gives_the_same_tokens(tmp_path, monkeypatch, name):
    """As by default, with a file in the place of the download."""
    kind, recipe = OFFICIAL[name], small(name)
    size = recipe.input_sizes[256]
    weights = rounded(kind, random_weights(kind))
    if kind.registers:  # timm computes the periods
        weights["periods"] = 100 ** (torch.arange(4, dtype=torch.float64) / 4)
    official = loaded(tmp_path, name, kind, weights)
    state = {"norm.weight": weights["norm.weight"], "norm.bias": weights["norm.bias"]}
    state |= official.vit.state_dict()
    if kind.table == 14:
        state["pos_embed"] = weights["table"][None]
    if name == "clip-vit-L":
        state |= {"head.weight": torch.zeros(768, 48), "head.bias": torch.zeros(768)}
    content = kind.layout(weights) if name == "jepa-vit-h" else state
    torch.save(content, tmp_path / "hub.pth")
    create = timm.create_model
    overlay = {"file": str(tmp_path / "hub.pth")}
    monkeypatch.setattr(
        timm, "create_model", lambda *args, **o: create(*args, pretrained_cfg_overlay=overlay, **o)
    )
    fetched = FrozenViT(recipe, size)
    assert torch.equal(fetched(pictures(256)), official(pictures(256)))


@pytest.mark.parametrize("name", OFFICIAL)
def test_preprocessing_is_the_official_one_in_its_order(monkeypatch, name):
    kind = OFFICIAL[name]
    recipe = small(name)
    encoder = FrozenViT(recipe, recipe.input_sizes[256], pretrained=False)
    images = pictures(256)
    seen = []
    resize = F.interpolate
    monkeypatch.setattr(
        F, "interpolate", lambda x, *args, **options: seen.append(x) or resize(x, *args, **options)
    )
    x = encoder.preprocess(images)
    monkeypatch.undo()
    oracle = prepared(kind, images, torch.float64)
    working = prepared(kind, images, torch.float32)
    assert_within_budget("preprocessed images", x, oracle, working)
    if kind.channels is OPENAI:  # resized in [0, 1]
        assert torch.equal(seen[0], images / 255)
    elif kind.resized_to:  # resized after normalising
        normalised = prepared(replace(kind, resized_to=0), images, torch.float32)
        assert torch.allclose(seen[0], normalised, rtol=0, atol=1e-6)
        antialiased = F.interpolate(normalised, (224, 224), mode="bicubic", antialias=True)
        assert (antialiased - x).abs().max() > 0.1
    else:
        assert not seen


@pytest.mark.parametrize("name", ["mae-vit-l", "dinov3-vit-b", "siglip2-vit-b"])
def test_images_of_another_size_are_refused_where_nothing_resizes(name):
    encoder = FrozenViT(small(name), 256, pretrained=False)
    with pytest.raises(ValueError, match=rf"{name}: .*512, 512.*expected \(B, 3, 256, 256\)"):
        encoder(pictures(512))


@pytest.mark.parametrize("name", OFFICIAL)
def test_tokens_are_in_row_major_order(tmp_path, name):
    kind = OFFICIAL[name]
    encoder = loaded(tmp_path, name, kind, random_weights(kind))
    images = pictures(256)
    changed = images.clone()
    changed[..., 48:64, 144:160] ^= 255  # row 3, column 9
    moved = (encoder(changed) - encoder(images)).norm(dim=-1).mean(0)
    assert moved.argmax().item() == 3 * 16 + 9


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_module_is_frozen(name):
    recipe = small(name)
    encoder = FrozenViT(recipe, recipe.input_sizes[256], pretrained=False)
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("name", ["clip-vit-L", "jepa-vit-h", "dinov3-vit-b"])
def test_it_compiles_as_one_graph_and_follows_autocast(name):
    recipe = small(name)
    encoder = FrozenViT(recipe, recipe.input_sizes[256], pretrained=False)
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    images = pictures(256)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, expected = compiled(images), encoder(images)
    assert torch.equal(tokens, expected) and not tokens.requires_grad
    exact = encoder(images)
    error = ((expected - exact).norm() / exact.norm()).item()
    assert 2**-12 < error < 2**-4  # of bf16, not of fp32


def test_every_family_is_tried():
    def family(name):
        return name.partition("-")[0]

    assert {family(recipe.name) for recipe in RECIPES} == set(map(family, OFFICIAL))
    assert facebook(random_weights(OFFICIAL["dinov1-vit-b"]))["cls_token"].shape == (1, 1, 48)
