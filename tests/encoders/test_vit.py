"""Encoders from official files, against plain forward passes written from the official code."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from repa_fast.encoders.registry import REGISTRY
from repa_fast.encoders.vit import FrozenViT
from repa_fast.testing import assert_within_budget
from tests.encoders import plain
from tests.encoders.plain import OFFICIAL, PERIODS, exact_periods, pictures, random_weights, small
from tests.refusals import refused

timm = pytest.importorskip("timm")


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
        plain.official_tokens(kind, weights, images, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert_within_budget("patch tokens", tokens, oracle, working)
    return tokens


def random_network(name) -> FrozenViT:
    recipe = small(name, depth=1)
    return FrozenViT(recipe, recipe.input_sizes[256], pretrained=False)


def official(name, folder):
    """An encoder of official weights, and these, as exact as their file: CLIP's is in fp16."""
    kind = OFFICIAL[name]
    weights = random_weights(kind)
    if kind.layout is plain.clip_state:
        weights = {name: value.half().float() for name, value in weights.items()}
    encoder = loaded(folder, name, weights)
    return SimpleNamespace(name=name, kind=kind, weights=weights, encoder=encoder)


@pytest.fixture(scope="module", params=OFFICIAL)
def every(request, tmp_path_factory):
    """Each encoder in turn."""
    return official(request.param, tmp_path_factory.mktemp("weights"))


def test_an_official_file_gives_the_official_tokens_of_a_frozen_module(every):
    tokens = assert_official(every.encoder, every.kind, every.weights)
    assert tokens.shape == (2, 256, 48) and tokens.dtype == torch.float32
    assert not any(module.training for module in every.encoder.modules())
    assert not any(parameter.requires_grad for parameter in every.encoder.parameters())
    assert all(block.attn.fused_attn for block in every.encoder.vit.blocks)


def test_images_are_resized_before_or_after_normalising_as_upstream(every, monkeypatch):
    kind, images, seen = every.kind, pictures(), []
    resize = F.interpolate
    monkeypatch.setattr(
        F, "interpolate", lambda x, *args, **options: seen.append(x) or resize(x, *args, **options)
    )
    every.encoder.preprocess(images)
    if kind.channels is plain.OPENAI:
        assert torch.equal(seen[0], images / 255)
    elif kind.resized_to:
        normalised = plain.prepared(replace(kind, resized_to=0), images, torch.float32)
        assert torch.allclose(seen[0], normalised, rtol=0, atol=1e-6)
    else:
        assert not seen


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("dinov2-vit-s", {"eps": 1e-5}),
        ("dinov1-vit-b", {"eps": 1e-5}),
        ("dinov1-vit-b", {"final_norm": False}),
        ("mae-vit-l", {"final_norm": True}),
        ("mae-vit-l", {"antialias": False}),
        ("clip-vit-L", {"activation": F.gelu}),
        ("clip-vit-L", {"eps": 1e-6}),
        ("clip-vit-L", {"channels": plain.IMAGENET, "resized_to": 224}),
        ("jepa-vit-h", {"channels": plain.HALVES}),
        ("jepa-vit-h", {"eps": 1e-5}),
        ("dinov3-vit-b", {"eps": 1e-6}),
        ("dinov3-vit-b", {"activation": plain.tanh_gelu}),
        ("dinov3-vit-b", {PERIODS: exact_periods()}),  # which are not those of the file
        ("siglip2-vit-b", {"activation": F.gelu}),
        ("siglip2-vit-b", {"channels": plain.IMAGENET}),
    ],
)
def test_another_choice_would_show(tmp_path, name, wrong):
    one = official(name, tmp_path)
    weights = one.weights | wrong if PERIODS in wrong else one.weights
    kind = one.kind if PERIODS in wrong else replace(one.kind, **wrong)
    with pytest.raises(AssertionError, match="of the error is"):
        assert_official(one.encoder, kind, weights)


@pytest.mark.parametrize(
    "name, resolution, grid",
    [
        ("dinov2-vit-s", 512, 37),
        ("dinov3-vit-b", 512, 0),
        ("siglip2-vit-b", 512, 32),
        ("mae-vit-l", 256, 16),
    ],
)
def test_at_512_pixels_and_with_a_table_that_fits(tmp_path, name, resolution, grid):
    kind = replace(OFFICIAL[name], table=grid)
    weights = random_weights(kind)
    encoder = loaded(tmp_path, name, weights, resolution=resolution)
    tokens = assert_official(encoder, kind, weights, resolution)
    assert tokens.shape == (2, (resolution // 16) ** 2, 48)


def test_the_slips_in_the_names_of_moco_v3_l(tmp_path):
    kind = OFFICIAL["mocov3-vit-b"]
    weights = random_weights(kind, depth=15)
    content = plain.moco_checkpoint(weights)["state_dict"]
    assert "module.base_encoder.blocks.14.mlp.fc14.weight" in content
    encoder = loaded(tmp_path, "mocov3-vit-l", weights, depth=15, layout=kind.layout)
    assert_official(encoder, kind, weights)


def only_target(weights):
    """A checkpoint of I-JEPA without the context encoder, which goes before the target."""
    return {"target_encoder": OFFICIAL["jepa-vit-h"].layout(weights)["encoder"], "epoch": 300}


@pytest.mark.parametrize(
    "name, layout", [("dinov1-vit-b", plain.dino_checkpoint), ("jepa-vit-h", only_target)]
)
def test_other_layouts_of_official_files(tmp_path, name, layout):
    weights = random_weights(OFFICIAL[name])
    encoder = loaded(tmp_path, name, weights, layout=layout)
    assert_official(encoder, OFFICIAL[name], weights)


def test_dinov3_without_biases_or_periods(tmp_path):
    """As timm's files have it: the periods follow from the width of a head."""
    kind = OFFICIAL["dinov3-vit-b"]
    weights = random_weights(kind) | {PERIODS: exact_periods()}
    weights |= {f"blocks.{block}.attn.qkv.bias": torch.zeros(3 * 48) for block in range(2)}

    def bare(weights):
        left_out = ("qkv.bias", "bias_mask", "periods")
        return {k: v for k, v in kind.layout(weights).items() if not k.endswith(left_out)}

    assert_official(loaded(tmp_path, "dinov3-vit-b", weights, layout=bare), kind, weights)


@pytest.mark.parametrize("name", [name for name in OFFICIAL if name != "mocov3-vit-b"])
def test_what_timm_fetches_gives_the_same_tokens(tmp_path, monkeypatch, name):
    """As by default, with a file in the place of the download; and the same file when given."""
    from safetensors.torch import save_file

    one, recipe = official(name, tmp_path), small(name)
    if PERIODS in one.weights:  # timm computes them
        one.encoder = loaded(tmp_path, name, one.weights | {PERIODS: exact_periods()})
    size, create = recipe.input_sizes[256], timm.create_model
    whole = {"num_classes": 5} | recipe.options  # with heads, norms and poolings we leave out
    state = create(recipe.model.format(size=size).partition(".")[0], img_size=size, **whole)
    state = {k: v for k, v in state.state_dict().items() if name == "clip-vit-L" or "head" not in k}
    state |= {f"norm.{end}": one.weights[f"norm.{end}"] for end in ("weight", "bias")}
    state |= one.encoder.vit.state_dict()
    if one.kind.table not in (0, 16):
        state["pos_embed"] = one.weights["pos_embed"][:, int(one.kind.registers) :].clone()
    path = tmp_path / ("hub.pth" if name == "jepa-vit-h" else "hub.safetensors")
    if name == "jepa-vit-h":  # as its authors have it
        torch.save(one.kind.layout(one.weights), path)
    else:
        save_file(state, path)
    given = FrozenViT(recipe, size, str(path))
    overlay = {"file": str(path)}
    monkeypatch.setattr(
        timm, "create_model", lambda *args, **o: create(*args, pretrained_cfg_overlay=overlay, **o)
    )
    tokens = one.encoder(pictures())
    for encoder in (given, FrozenViT(recipe, size)):
        assert torch.equal(encoder(pictures()), tokens)


@pytest.mark.parametrize("name", ["mae-vit-l", "dinov3-vit-b", "siglip2-vit-b"])
def test_images_of_another_size_are_refused_where_nothing_resizes(name):
    network = random_network(name)
    refused(lambda: network(pictures(512)), rf"{name}: .*512, 512.*expected \(B, 3, 256, 256\)")


@pytest.mark.parametrize(
    "name",
    [
        "dinov2-vit-s",
        *(pytest.param(name, marks=pytest.mark.heavy) for name in ("dinov3-vit-b", "clip-vit-L")),
        pytest.param("jepa-vit-h", marks=pytest.mark.heavy),
    ],
)
def test_it_compiles_as_one_graph_and_follows_autocast(name):
    encoder, images = random_network(name), pictures()
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
