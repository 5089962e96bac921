"""Encoders from official files, against plain forward passes written from the official code."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from repa_fast.encoders.registry import REGISTRY
from repa_fast.encoders.vit import FrozenViT
from repa_fast.testing import assert_within_budget
from tests.encoders.plain import (
    IMAGENET,
    OFFICIAL,
    OPENAI,
    clip_state,
    dino_checkpoint,
    exact_periods,
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
ON_THE_HUB = [name for name in OFFICIAL if not name.startswith("mocov3")]


def loaded(tmp_path, name, weights, *, resolution=256, depth=2, layout=None) -> FrozenViT:
    recipe = small(name, depth)
    path = tmp_path / "weights.pth"
    torch.save((layout or OFFICIAL[name].layout)(weights), path)
    return FrozenViT(recipe, recipe.input_sizes[resolution], str(path))


def assert_official(encoder, kind, weights, resolution=256) -> torch.Tensor:
    """Return the tokens, which are the official ones."""
    images = pictures(resolution)
    tokens = encoder(images)
    oracle, working = (
        official_tokens(kind, weights, images, dtype) for dtype in (torch.float64, torch.float32)
    )
    assert_within_budget("patch tokens", tokens, oracle, working)
    return tokens


def random_network(name) -> FrozenViT:
    recipe = small(name)
    return FrozenViT(recipe, recipe.input_sizes[256], pretrained=False)


def file_weights(kind):
    """Random weights as exact as their file: CLIP's are in half precision."""
    weights = random_weights(kind)
    if kind.layout is clip_state:
        return {name: value.half().float() for name, value in weights.items()}
    return weights


def official(name, folder):
    """An encoder of official weights, and these."""
    kind = OFFICIAL[name]
    weights = file_weights(kind)
    encoder = loaded(folder, name, weights)
    return SimpleNamespace(name=name, kind=kind, weights=weights, encoder=encoder)


@pytest.fixture(scope="module", params=OFFICIAL)
def every(request, tmp_path_factory):
    """Each encoder in turn."""
    return official(request.param, tmp_path_factory.mktemp("weights"))


def test_an_official_file_gives_the_official_tokens(every):
    tokens = assert_official(every.encoder, every.kind, every.weights)
    assert tokens.shape == (2, 256, 48) and tokens.dtype == torch.float32


def test_the_module_is_frozen_and_its_attention_the_fused_one(every):
    assert not any(module.training for module in every.encoder.modules())
    assert not any(parameter.requires_grad for parameter in every.encoder.parameters())
    assert all(block.attn.fused_attn for block in every.encoder.vit.blocks)


def test_tokens_are_in_row_major_order(every):
    images = pictures(256)
    changed = images.clone()
    changed[..., 48:64, 144:160] ^= 255  # row 3, column 9
    moved = (every.encoder(changed) - every.encoder(images)).norm(dim=-1).mean(0)
    assert moved.argmax().item() == 3 * 16 + 9


def test_preprocessing_is_the_official_one_in_its_order(every, monkeypatch):
    kind, images, seen = every.kind, pictures(256), []
    resize = F.interpolate
    monkeypatch.setattr(
        F, "interpolate", lambda x, *args, **options: seen.append(x) or resize(x, *args, **options)
    )
    x = every.encoder.preprocess(images)
    monkeypatch.undo()
    oracle, working = (prepared(kind, images, dtype) for dtype in (torch.float64, torch.float32))
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


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("dinov2-vit-s", {"eps": 1e-5}),
        ("dinov1-vit-b", {"eps": 1e-5}),
        ("dinov1-vit-b", {"final_norm": False}),
        ("mae-vit-l", {"final_norm": True}),
        ("clip-vit-L", {"activation": gelu}),
        ("clip-vit-L", {"eps": 1e-6}),
        ("clip-vit-L", {"channels": IMAGENET, "resized_to": 224}),
        ("jepa-vit-h", {"channels": ((0.5,) * 3, (0.5,) * 3)}),
        ("jepa-vit-h", {"eps": 1e-5}),
        ("dinov3-vit-b", {"eps": 1e-6}),
        ("dinov3-vit-b", {"activation": tanh_gelu}),
        ("siglip2-vit-b", {"activation": gelu}),
        ("siglip2-vit-b", {"channels": IMAGENET}),
    ],
)
def test_another_choice_would_show(tmp_path, name, wrong):
    one = official(name, tmp_path)
    with pytest.raises(AssertionError, match="of the error is"):
        assert_official(one.encoder, replace(one.kind, **wrong), one.weights)


def test_the_periods_of_dinov3_are_those_of_the_file(tmp_path):
    one = official("dinov3-vit-b", tmp_path)
    with pytest.raises(AssertionError, match="of the error is"):
        assert_official(one.encoder, one.kind, one.weights | {"periods": exact_periods()})


@pytest.mark.parametrize(
    "name, grid", [("dinov2-vit-s", 37), ("dinov3-vit-b", 0), ("siglip2-vit-b", 32)]
)
def test_at_512_pixels(tmp_path, name, grid):
    kind = replace(OFFICIAL[name], table=grid)
    weights = random_weights(kind)
    encoder = loaded(tmp_path, name, weights, resolution=512)
    assert assert_official(encoder, kind, weights, resolution=512).shape == (2, 1024, 48)


def test_the_slips_in_the_names_of_moco_v3_l(tmp_path):
    kind = OFFICIAL["mocov3-vit-l"]
    weights = random_weights(kind, depth=15)
    content = moco_checkpoint(weights)["state_dict"]
    assert "module.base_encoder.blocks.14.mlp.fc14.weight" in content
    assert_official(loaded(tmp_path, "mocov3-vit-l", weights, depth=15), kind, weights)


@pytest.mark.parametrize("name", ["dinov1-vit-b", "mocov3-vit-b", "mae-vit-l"])
@pytest.mark.parametrize("grid", [14, 16])
def test_the_position_table_is_resampled_as_upstream(tmp_path, name, grid):
    """REPA calls timm's resampling: bicubic with antialias, whose kernel is another one."""
    kind = replace(OFFICIAL[name], table=grid)
    weights = random_weights(kind)
    encoder = loaded(tmp_path, name, weights)
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


def only_target(weights):
    """A checkpoint of I-JEPA without the context encoder, which goes before the target."""
    return {"target_encoder": OFFICIAL["jepa-vit-h"].layout(weights)["encoder"], "epoch": 300}


@pytest.mark.parametrize(
    "name, layout", [("dinov1-vit-b", dino_checkpoint), ("jepa-vit-h", only_target)]
)
def test_other_layouts_of_official_files(tmp_path, name, layout):
    weights = random_weights(OFFICIAL[name])
    encoder = loaded(tmp_path, name, weights, layout=layout)
    assert_official(encoder, OFFICIAL[name], weights)


def test_dinov3_without_biases_or_periods(tmp_path):
    """As timm's files have it: the periods follow from the width of a head."""
    kind = OFFICIAL["dinov3-vit-b"]
    weights = random_weights(kind) | {"periods": exact_periods()}
    weights |= {f"{block}.qkv.bias": torch.zeros(3 * 48) for block in range(2)}

    def bare(weights):
        left_out = ("qkv.bias", "bias_mask", "periods")
        return {k: v for k, v in kind.layout(weights).items() if not k.endswith(left_out)}

    assert_official(loaded(tmp_path, "dinov3-vit-b", weights, layout=bare), kind, weights)


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_a_file_of_timm_gives_the_same_tokens(tmp_path, name):
    from safetensors.torch import save_file

    recipe = small(name)
    size = recipe.input_sizes[256]
    torch.manual_seed(0)
    vit = timm.create_model(
        recipe.model.format(size=size).partition(".")[0],
        img_size=size,
        num_classes=5,
        **recipe.options,
    ).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    state = {name: v for name, v in vit.state_dict().items() if not name.startswith("head.")}
    if name == "clip-vit-L":  # whose files on the hub have the projection
        state = vit.state_dict()
    save_file(state, tmp_path / "timm.safetensors")
    encoder = FrozenViT(recipe, size, str(tmp_path / "timm.safetensors"))
    x = prepared(OFFICIAL[name], pictures(256), torch.float32)
    if not recipe.final_norm:
        vit.norm = torch.nn.Identity()
    with torch.no_grad():
        expected = vit.forward_features(x)[:, vit.num_prefix_tokens :]
    assert torch.allclose(encoder(pictures(256)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_what_timm_fetches_gives_the_same_tokens(tmp_path, monkeypatch, name):
    """As by default, with a file in the place of the download; and the same file when given."""
    recipe, kind = small(name), OFFICIAL[name]
    size = recipe.input_sizes[256]
    weights = file_weights(kind)
    if not kind.table:  # timm computes the periods
        weights["periods"] = exact_periods()
    encoder = loaded(tmp_path, name, weights)
    state = {"norm.weight": weights["norm.weight"], "norm.bias": weights["norm.bias"]}
    state |= encoder.vit.state_dict()
    if kind.table not in (0, 16):
        state["pos_embed"] = weights["table"][None, int(kind.registers) :]
    if name == "clip-vit-L":
        state |= {"head.weight": torch.zeros(768, 48), "head.bias": torch.zeros(768)}
    path = str(tmp_path / "hub.pth")
    torch.save(kind.layout(weights) if name == "jepa-vit-h" else state, path)
    given = FrozenViT(recipe, size, path)
    create, overlay = timm.create_model, {"file": path}
    monkeypatch.setattr(
        timm, "create_model", lambda *args, **o: create(*args, pretrained_cfg_overlay=overlay, **o)
    )
    fetched = FrozenViT(recipe, size)
    tokens = encoder(pictures(256))
    assert torch.equal(fetched(pictures(256)), tokens)
    assert torch.equal(given(pictures(256)), tokens)


@pytest.mark.parametrize("name", ["mae-vit-l", "dinov3-vit-b", "siglip2-vit-b"])
def test_images_of_another_size_are_refused_where_nothing_resizes(name):
    with pytest.raises(ValueError, match=rf"{name}: .*512, 512.*expected \(B, 3, 256, 256\)"):
        random_network(name)(pictures(512))


@pytest.mark.parametrize(
    "name",
    [
        "dinov2-vit-s",
        pytest.param("dinov3-vit-b", marks=pytest.mark.heavy),
        pytest.param("clip-vit-L", marks=pytest.mark.heavy),
        pytest.param("jepa-vit-h", marks=pytest.mark.heavy),
    ],
)
def test_it_compiles_as_one_graph_and_follows_autocast(name):
    encoder, images = random_network(name), pictures(256)
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, expected = compiled(images), encoder(images)
    assert torch.equal(tokens, expected) and not tokens.requires_grad
    exact = encoder(images)
    error = ((expected - exact).norm() / exact.norm()).item()
    assert 2**-12 < error < 2**-4  # of bf16, not of fp32


def test_every_family_is_tried():
    families = {name.partition("-")[0] for name in REGISTRY if name != "digits-vit"}
    assert {name.partition("-")[0] for name in OFFICIAL} == families
    assert facebook(random_weights(OFFICIAL["dinov1-vit-b"]))["cls_token"].shape == (1, 1, 48)
