"""Weight files that do not fit: the error says what was expected and what was there."""

import fractions
import zipfile

import pytest
import torch

from repa_fast import encoders
from repa_fast.encoders.recipes import RECIPES
from repa_fast.encoders.vit import FrozenViT
from tests.encoders.plain import OFFICIAL, dino_checkpoint, random_weights, small

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


@pytest.mark.parametrize("name", OFFICIAL)
def test_another_size_is_named(refused, name):
    kind = OFFICIAL[name]
    content = kind.layout(random_weights(kind, depth=3))
    refused(
        name,
        content,
        rf"holds a ViT of width 48, depth 3, patch size {kind.patch}, "
        rf"expected width 48, depth 2, patch size {kind.patch} of {name}",
    )


LAYOUTS = {kind.layout: name for name, kind in reversed(OFFICIAL.items())}
INTERCHANGEABLE = {("dinov1-vit-b", "mae-vit-l")}  # told apart by their sizes alone


@pytest.mark.parametrize("given", LAYOUTS.values())
@pytest.mark.parametrize("name", LAYOUTS.values())
def test_a_file_of_another_encoder_is_refused(refused, name, given):
    if name == given or {given, name} == {"dinov3-vit-b", "dinov3-vit-splus"}:
        return
    if (given, name) in INTERCHANGEABLE:
        assert len({encoders.spec(one).width for one in (given, name)}) == 2
        return
    kind = OFFICIAL[given]
    refused(name, kind.layout(random_weights(kind)), name)


def test_mlp_and_swiglu_of_dinov3_are_told_apart(refused):
    for given, name in (("dinov3-vit-b", "dinov3-vit-splus"), ("dinov3-vit-splus", "dinov3-vit-b")):
        kind = OFFICIAL[given]
        refused(name, kind.layout(random_weights(kind)), r"lacks 8|lacks 4")


def test_a_position_table_that_is_not_the_encoders_is_refused(refused):
    for name in ("clip-vit-L", "jepa-vit-h", "siglip2-vit-b"):  # nothing resamples these upstream
        kind = OFFICIAL[name]
        weights = random_weights(kind)
        weights["table"] = torch.zeros(kind.cls + 32**2, 48)
        refused(name, kind.layout(weights), r"other shapes 1: pos_embed \(1, 102[45], 48\)")
    kind = OFFICIAL["mae-vit-l"]
    weights = random_weights(kind) | {"table": torch.zeros(200, 48)}  # not a square
    refused("mae-vit-l", kind.layout(weights), r"other shapes 1: pos_embed \(1, 200, 48\)")


def test_periods_of_another_width_are_refused(refused):
    kind = OFFICIAL["dinov3-vit-b"]
    weights = random_weights(kind) | {"periods": torch.ones(7)}
    refused("dinov3-vit-b", kind.layout(weights), r"rope_embed\.periods \(7,\), expected \(4,\)")


@pytest.mark.parametrize("name", OFFICIAL)
def test_what_is_not_weights_is_refused(refused, tmp_path, name):
    recipe = small(name)
    refused(name, torch.zeros(3), "cannot be read .*: expected a dictionary, got Tensor")
    refused(name, [1, 2], "expected a dictionary, got list")
    refused(name, {"model": fractions.Fraction(1, 2)}, "cannot be read .*: UnpicklingError")
    refused(name, {"epoch": 3}, rf"is not a file of {name}: expected .*, got one with epoch")
    refused(name, {}, "got one with nothing")
    for file, content in (
        ("text.pth", b"<html>404</html>"),
        ("text.safetensors", b"<html>404</html>"),
        ("empty.pth", b""),
        ("cut.pth", b"PK\x03\x04" + bytes(100)),
        ("damaged.pth", b"PK\x05\x06" + b"\x01" * 18),
        ("noise.pth", bytes(range(256)) * 10),
    ):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{file} cannot be read"):
            FrozenViT(recipe, recipe.input_sizes[256], str(tmp_path / file))
    with pytest.raises(ValueError, match=r"absent\.pth is not a file"):
        FrozenViT(recipe, recipe.input_sizes[256], str(tmp_path / "absent.pth"))


def test_a_torchscript_archive_is_refused_with_the_way_out(tmp_path):
    """As openai/CLIP publishes its weights."""
    path = tmp_path / "ViT-L-14.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"ViT-L-14/{name}", b"")
    with pytest.raises(ValueError, match=r"is a TorchScript archive.*jit\.load\('.*L-14\.pt"):
        FrozenViT(small("clip-vit-L"), 224, str(path))


def test_flags_in_a_checkpoint_are_no_code(tmp_path):
    kind = OFFICIAL["dinov1-vit-b"]
    content = dino_checkpoint(random_weights(kind))
    torch.save(content, tmp_path / "checkpoint.pth")
    FrozenViT(small("dinov1-vit-b"), 256, str(tmp_path / "checkpoint.pth"))


def test_files_of_the_old_format_are_read(tmp_path):
    """torch.save before 1.6, which cannot be mapped."""
    kind = OFFICIAL["dinov1-vit-b"]
    path = tmp_path / "old.pth"
    torch.save(kind.layout(random_weights(kind)), path, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    FrozenViT(small("dinov1-vit-b"), 256, str(path))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
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
        assert f"fetched from {config.hf_hub_id or config.url}; give" in message
        assert isinstance(caught.value.__cause__, OSError)
