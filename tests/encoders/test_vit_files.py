"""Weight files that do not fit: the error says what was expected and what was there."""

import argparse
import fractions
import zipfile

import pytest
import torch

from repa_fast import encoders
from repa_fast.configs.config import TrainConfig
from repa_fast.distributed import World
from repa_fast.encoders.recipes import DINOV2, RECIPES
from repa_fast.encoders.registry import REGISTRY
from repa_fast.encoders.vit import FrozenViT, load_file
from repa_fast.objective.encoders import Encoders
from tests.encoders.plain import (
    OFFICIAL,
    dino_checkpoint,
    official_tokens,
    pictures,
    random_weights,
    small,
)

timm = pytest.importorskip("timm")


@pytest.fixture
def refused(tmp_path):
    """(encoder, content, expected message): a file of `content` must be refused."""

    def check(name: str, content: object, message: str) -> None:
        path = tmp_path / "given.pth"
        torch.save(content, path)
        recipe = small(name)
        with pytest.raises(ValueError, match=message):
            FrozenViT(recipe, recipe.input_sizes[256], str(path))

    return check


def flat(content: object) -> dict:
    """The one dictionary of tensors that is read, to be changed in place."""
    for key in ("encoder", "state_dict", "model"):
        if isinstance(content.get(key), dict):
            return content[key]
    return content


@pytest.mark.parametrize("name", OFFICIAL)
def test_what_is_missing_or_too_much_is_named(refused, name):
    kind = OFFICIAL[name]

    def official():
        content = kind.layout(random_weights(kind))
        return content, flat(content)

    content, state = official()
    ends = ("base_encoder.norm.weight", "ln_post.weight", "post_layernorm.weight")
    bare = ("norm.weight", "module.norm.weight")
    (norm,) = (key for key in state if key in bare or key.endswith(ends))
    del state[norm]
    refused(name, content, rf"as {name} has, but lacks 1: norm\.weight$")
    content, state = official()
    state[norm.replace("weight", "extra")] = torch.zeros(3)
    refused(name, content, r"has, but also has 1: norm\.extra$")
    content, state = official()
    state[norm] = torch.zeros(5)
    refused(name, content, r"other shapes 1: norm\.weight \(5,\), expected \(48,\)$")
    content = kind.layout(random_weights(kind, depth=3))
    refused(
        name,
        content,
        rf"holds a ViT of width 48, depth 3, patch size {kind.patch}, "
        rf"expected width 48, depth 2, patch size {kind.patch} of {name}",
    )


def test_the_size_of_dinov2_is_named(tmp_path):
    """By state dicts with its true shapes, without their memory."""

    def full_size(name, **options):
        with torch.device("meta"):
            model = encoders.spec(name).model
            return timm.create_model(model, img_size=518, num_classes=0, **options)

    def expect(state, message):
        hollow = {name: torch.zeros(()).expand(value.shape) for name, value in state.items()}
        torch.save(hollow, tmp_path / "given.pth")
        with pytest.raises(ValueError, match=message):
            load_file(vit, tmp_path / "given.pth", encoders.spec("dinov2-vit-s"))

    vit = full_size("dinov2-vit-s")
    for name in ("dinov2-vit-b", "dinov2reg-vit-s"):
        expect(full_size(name).state_dict(), f"holds {name}, expected dinov2-vit-s")
    narrow = full_size("dinov2-vit-s", embed_dim=96, depth=2)
    expect(narrow.state_dict(), "a ViT of width 96, depth 2, .* expected dinov2-vit-s")
    part = {name: value for name, value in vit.state_dict().items() if ".ls2." not in name}
    expect(part, r"holds dinov2-vit-s, but lacks 12: blocks.0.ls2.gamma, .*, \.\.\.$")


def test_what_makes_a_state_dict_of_dinov2_is_named(refused):
    state = OFFICIAL["dinov2-vit-s"].layout(random_weights(OFFICIAL["dinov2-vit-s"]))
    del state["pos_embed"]
    for content, message in (
        (state, "not a DINOv2 state dict: expected pos_embed, got blocks.0"),
        ({"cls_token": 3}, "DINOv2 state dict: expected patch_embed.proj.weight, cls_token"),
        ({"model": argparse.Namespace()}, "cannot be read"),  # weights only
    ):
        refused("dinov2-vit-s", content, message)


LAYOUTS = {kind.layout: name for name, kind in reversed(OFFICIAL.items())}
INTERCHANGEABLE = {("dinov1-vit-b", "mae-vit-l")}  # told apart by their sizes alone


@pytest.mark.parametrize("name", LAYOUTS.values())
def test_a_file_of_another_encoder_is_refused(refused, name):
    for given in set(LAYOUTS.values()) - {name}:
        if (given, name) in INTERCHANGEABLE:
            assert len({encoders.spec(one).width for one in (given, name)}) == 2
            continue
        kind = OFFICIAL[given]
        refused(name, kind.layout(random_weights(kind)), f"{name}|is not a DINOv2 state dict")


@pytest.mark.parametrize(
    "given, name, message",
    [
        ("dinov3-vit-b", "dinov3-vit-splus", r"lacks 8|lacks 4"),
        ("dinov3-vit-splus", "dinov3-vit-b", r"lacks 8|lacks 4"),
        ("dinov2reg-vit-g", "dinov2reg-vit-s", r"other shapes 6: blocks\.0\.mlp\.fc1"),
    ],
)
def test_mlp_and_swiglu_are_told_apart(refused, given, name, message):
    refused(name, OFFICIAL[given].layout(random_weights(OFFICIAL[given])), message)


@pytest.mark.parametrize(
    "name, weights, message",
    [  # nothing resamples the first three upstream; the fourth is no square
        ("clip-vit-L", {"table": torch.zeros(1025, 48)}, r"pos_embed \(1, 1025, 48\)"),
        ("jepa-vit-h", {"table": torch.zeros(1024, 48)}, r"pos_embed \(1, 1024, 48\)"),
        ("siglip2-vit-b", {"table": torch.zeros(1024, 48)}, r"pos_embed \(1, 1024, 48\)"),
        ("mae-vit-l", {"table": torch.zeros(200, 48)}, r"pos_embed \(1, 200, 48\)"),
        (
            "dinov3-vit-b",
            {"periods": torch.ones(7)},
            r"rope_embed\.periods \(7,\), expected \(4,\)",
        ),
    ],
)
def test_positions_that_are_not_the_encoders_are_refused(refused, name, weights, message):
    kind = OFFICIAL[name]
    content = kind.layout(random_weights(kind) | weights)
    refused(name, content, f"other shapes 1: {message}")


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_dictionary_without_weights_is_refused(refused, name):
    if name.startswith("dinov2"):
        refused(name, {"epoch": 3}, "is not a DINOv2 state dict: expected .*, got nothing")
        return
    refused(name, {"epoch": 3}, rf"is not a file of {name}: expected .*, got one with epoch")
    refused(name, {}, "got one with nothing")


def test_what_is_no_dictionary_is_refused(refused):
    refused("mae-vit-l", torch.zeros(3), "cannot be read .*: expected a dictionary, got Tensor")
    refused("mae-vit-l", [1, 2], "expected a dictionary, got list")
    code = {"model": fractions.Fraction(1, 2)}
    refused("mae-vit-l", code, "cannot be read .*: UnpicklingError")


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("text.pth", b"<html>404</html>", "cannot be read"),
        ("text.safetensors", b"<html>404</html>", "cannot be read"),
        ("empty.pth", b"", "cannot be read"),
        ("cut.pth", b"PK\x03\x04" + bytes(100), "cannot be read"),
        ("damaged.pth", b"PK\x05\x06" + b"\x01" * 18, "cannot be read"),
        ("noise.pth", bytes(range(256)) * 10, "cannot be read"),
        ("absent.pth", None, "is not a file"),
    ],
)
@pytest.mark.parametrize("name", ["dinov2-vit-s", "mae-vit-l"])
def test_damaged_files_are_refused(tmp_path, name, file, content, message):
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file} {message}"):
        FrozenViT(small(name), 224, str(tmp_path / file))


def test_a_torchscript_archive_is_refused_with_the_way_out(tmp_path):
    """As openai/CLIP publishes its weights."""
    path = tmp_path / "ViT-L-14.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"ViT-L-14/{name}", b"")
    with pytest.raises(ValueError, match=r"is a TorchScript archive.*jit\.load\('.*L-14\.pt"):
        FrozenViT(small("clip-vit-L"), 224, str(path))


def test_files_of_the_old_format_are_read(tmp_path):
    """torch.save before 1.6, which cannot be mapped; with flags, which are no code."""
    content = dino_checkpoint(random_weights(OFFICIAL["dinov1-vit-b"]))
    assert isinstance(content["args"], argparse.Namespace)
    path = tmp_path / "old.pth"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    FrozenViT(small("dinov1-vit-b"), 256, str(path))


@pytest.mark.parametrize("recipe", (*DINOV2, *RECIPES), ids=lambda recipe: recipe.name)
def test_without_the_weights_the_error_says_what_to_do(monkeypatch, recipe):
    def offline(*_, **options):
        assert options["pretrained"]
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    kind = RuntimeError if recipe.hub else ValueError
    with pytest.raises(kind) as caught:
        encoders.load(recipe.name, 256, "cpu")
    message = str(caught.value)
    assert recipe.name in message and f"--enc-weights FILE, where FILE is {recipe.file}" in message
    if recipe.hub:
        config = timm.get_pretrained_cfg(recipe.model.format(size=recipe.input_sizes[256]))
        assert "neither in the local cache" in message
        assert f"fetched from {config.hf_hub_id or config.url}; give" in message
        assert isinstance(caught.value.__cause__, OSError)


def test_a_run_loads_each_encoder_from_its_file(monkeypatch, tmp_path):
    names, paths, weights = ("dinov2-vit-s", "mae-vit-l"), [], {}
    for name in names:
        monkeypatch.setitem(REGISTRY, name, small(name))
        weights[name] = random_weights(OFFICIAL[name])
        paths.append(str(tmp_path / f"{name}.pth"))
        torch.save(OFFICIAL[name].layout(weights[name]), paths[-1])
    config = TrainConfig(enc_type=",".join(names), enc_weights=",".join(paths))
    alignment = Encoders(config)
    alignment.load(World(0, 1, torch.device("cpu")))
    for name in names:
        tokens = alignment.encoders[name](pictures(256))
        expected = official_tokens(OFFICIAL[name], weights[name], pictures(256), torch.float32)
        torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)
        assert not tokens.requires_grad


@pytest.mark.parametrize("local_rank, expected", [("0", "load barrier"), ("1", "barrier load")])
def test_the_first_process_of_a_machine_loads_first(monkeypatch, local_rank, expected):
    events = []

    class Recorder(World):
        def barrier(self):
            events.append("barrier")

    monkeypatch.setattr(encoders, "load", lambda *_: events.append("load"))
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    Encoders(TrainConfig()).load(Recorder(5, 8, torch.device("cpu")))
    assert " ".join(events) == expected
