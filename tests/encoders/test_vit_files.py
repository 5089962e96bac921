"""Weight files that do not fit: the error says what was expected and what was there."""

import argparse
import fractions
import re
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
from tests.encoders import plain
from tests.encoders.plain import OFFICIAL, PERIODS, pictures, random_weights, small
from tests.refusals import refused

timm = pytest.importorskip("timm")


@pytest.fixture
def refuse(tmp_path):
    """(encoder, content, words): a file of `content` must be refused with these."""

    def check(name: str, content: object, words: str) -> None:
        path, recipe = tmp_path / "given.pth", small(name)
        torch.save(content, path)
        refused(lambda: FrozenViT(recipe, recipe.input_sizes[256], str(path)), words)

    return check


def official(name: str, depth: int = 2, **changed: torch.Tensor) -> dict:
    """What a file of that encoder holds, random, some of its weights changed."""
    weights = random_weights(OFFICIAL[name], depth) | changed
    return OFFICIAL[name].layout({k: v for k, v in weights.items() if v is not None})


def hollow(part: str, tensor: torch.Tensor) -> dict:
    """SigLIP's file with `tensor` in the place of those with `part` in their names."""
    return {n: tensor if part in n else given for n, given in official("siglip2-vit-b").items()}


@pytest.mark.parametrize("name", OFFICIAL)
def test_what_is_missing_or_too_much_is_named(refuse, name):
    norm = "norm.weight"
    refuse(name, official(name, **{norm: None}), rf"as {name} has, but lacks 1: norm\.weight$")
    extra = {"norm.extra": torch.zeros(3)}
    refuse(name, official(name, **extra), r"has, but also has 1: norm\.extra$")
    words = r"other shapes 1: norm\.weight \(5,\), expected \(48,\)$"
    refuse(name, official(name, **{norm: torch.zeros(5)}), words)
    size, patch = "width 48, depth {}, patch size {}", OFFICIAL[name].patch
    words = f"holds a ViT of {size.format(3, patch)}, expected {size.format(2, patch)} of {name}"
    refuse(name, official(name, depth=3), words)


def test_the_size_of_dinov2_is_named(tmp_path):
    """By state dicts with its true shapes, without their memory."""

    def full_size(name, **options):
        with torch.device("meta"):
            model = encoders.spec(name).model
            return timm.create_model(model, img_size=518, num_classes=0, **options)

    def expect(state, words):
        hollow = {name: torch.zeros(()).expand(value.shape) for name, value in state.items()}
        path = tmp_path / "given.pth"
        torch.save(hollow, path)
        refused(lambda: load_file(vit, path, encoders.spec("dinov2-vit-s")), words)

    vit = full_size("dinov2-vit-s")
    for name in ("dinov2-vit-b", "dinov2reg-vit-s"):
        expect(full_size(name).state_dict(), f"holds {name}, expected dinov2-vit-s")
    narrow = full_size("dinov2-vit-s", embed_dim=96, depth=2)
    expect(narrow.state_dict(), "a ViT of width 96, depth 2, .* expected dinov2-vit-s")
    part = {name: value for name, value in vit.state_dict().items() if ".ls2." not in name}
    expect(part, r"holds dinov2-vit-s, but lacks 12: blocks.0.ls2.gamma, .*, \.\.\.$")


@pytest.mark.parametrize(
    "name, content, words",
    [
        (
            "dinov2-vit-s",
            official("dinov2-vit-s", pos_embed=None),
            "not a DINOv2 state dict: expected pos_embed, got blocks.0",
        ),
        (
            "dinov2-vit-s",
            {"cls_token": 3},
            "DINOv2 state dict: expected patch_embed.proj.weight, cls_token",
        ),
        ("dinov2-vit-s", {"model": argparse.Namespace()}, "code: it names argparse.N"),
        ("dinov2-vit-s", {"epoch": 3}, "not a DINOv2 state dict: expected .*, got nothing"),
        ("mae-vit-l", {"epoch": 3}, "not a file of mae-vit-l: expected .*, got one with epoch"),
        ("mae-vit-l", {}, "got one with nothing"),
        ("mae-vit-l", torch.zeros(3), "holds a Tensor, expected a dictionary"),
        ("mae-vit-l", [1, 2], "holds a list, expected a dictionary"),
        (
            "mae-vit-l",
            {"model": fractions.Fraction(1, 2)},
            "pth holds code: it names fractions.Fraction, expected tensors and plain values$",
        ),
        ("dinov2-vit-s", official("dinov2-vit-s", pos_embed=torch.zeros(48)), "expected pos_embed"),
        ("dinov2reg-vit-s", official("dinov2reg-vit-s", register_tokens=torch.zeros(4)), "holds"),
        ("siglip2-vit-b", hollow("position_embedding", torch.zeros(0)), r"pos_embed \(1, 1, 0\)"),
        ("siglip2-vit-b", hollow("q_proj.weight", torch.zeros(())), "lacks 2: blocks.0.attn.qkv.w"),
        # MLP and SwiGLU are told apart
        ("dinov3-vit-splus", official("dinov3-vit-b"), "lacks 8|lacks 4"),
        ("dinov3-vit-b", official("dinov3-vit-splus"), "lacks 8|lacks 4"),
        (
            "dinov2reg-vit-s",
            official("dinov2reg-vit-g"),
            r"other shapes 6: blocks\.0\.mlp\.fc1",
        ),
    ],
)
def test_what_is_another_file_is_said(refuse, name, content, words):
    refuse(name, content, words)


NORM = torch.ones(48)
UNREAL = [
    ("siglip2-vit-b", "post_layernorm.weight", NORM.to_sparse(), "is sparse_coo, expected a dense"),
    ("siglip2-vit-b", "0.self_attn.q_proj.weight", NORM.to("meta"), "is on meta, expected a dense"),
    ("dinov2-vit-s", "norm.weight", NORM + 1j, "norm.weight is of complex64, expected floating"),
    ("dinov2-vit-s", "norm.weight", NORM.long(), "norm.weight is of int64, expected floating"),
    ("mae-vit-l", "norm.weight", NORM / 0, "norm.weight has NaN or infinite values, expected fin"),
    ("mae-vit-l", "module.norm.weight", NORM, "norm.weight is there with and without module."),
    ("dinov3-vit-b", "norm.bias", NORM * torch.nan, "norm.bias has NaN or infinite values"),
    ("dinov3-vit-b", PERIODS, torch.full((4,), torch.nan), "periods has NaN or infinite"),
]


@pytest.mark.parametrize("name, tensor, value, words", UNREAL)
def test_tensors_that_are_no_weights_are_refused_by_name(refuse, name, tensor, value, words):
    content = official(name)
    inner = next((content[key] for key in ("model", "state_dict") if key in content), content)
    places = [place for place in inner if place.endswith(tensor)] or [tensor]
    inner |= {places[0]: value}
    refuse(name, content, words)


LAYOUTS = {kind.layout: name for name, kind in reversed(OFFICIAL.items())}
INTERCHANGEABLE = {("dinov1-vit-b", "mae-vit-l")}  # told apart by their sizes alone


@pytest.mark.parametrize("name", LAYOUTS.values())
def test_a_file_of_another_encoder_or_of_none_is_refused(refuse, name):
    refuse(name, {"epoch": 3}, f"is not a (file of {name}|DINOv2 state dict): expected")
    for given in set(LAYOUTS.values()) - {name}:
        if (given, name) in INTERCHANGEABLE:
            assert len({encoders.spec(one).width for one in (given, name)}) == 2
        else:
            refuse(name, official(given), f"{name}|is not a DINOv2 state dict")


@pytest.mark.parametrize(
    "name, tokens",
    [("clip-vit-L", 1025), ("jepa-vit-h", 1024), ("siglip2-vit-b", 1024), ("mae-vit-l", 200)],
)
def test_tables_that_nothing_resamples_upstream_or_that_are_no_square_are_refused(
    refuse, name, tokens
):
    content = official(name, pos_embed=torch.zeros(1, tokens, 48))
    refuse(name, content, rf"other shapes 1: pos_embed \(1, {tokens}, 48\)")


def test_periods_of_another_width_are_refused(refuse):
    content = official("dinov3-vit-b", **{PERIODS: torch.ones(7)})
    words = r"other shapes 1: rope_embed\.periods \(7,\), expected \(4,\)"
    refuse("dinov3-vit-b", content, words)


@pytest.mark.parametrize(
    "file, content",
    [
        ("text.pth", b"<html>404</html>"),
        ("text.safetensors", b"<html>404</html>"),
        ("empty.pth", b""),
        ("cut.pth", b"PK\x03\x04" + bytes(100)),
        ("damaged.pth", b"PK\x05\x06" + b"\x01" * 18),
        ("noise.pth", bytes(range(256)) * 10),
        ("absent.pth", None),
    ],
)
@pytest.mark.parametrize("name", ["dinov2-vit-s", "mae-vit-l"])
def test_damaged_files_are_refused(tmp_path, name, file, content):
    if content is not None:
        (tmp_path / file).write_bytes(content)
    words = f"{file} is not a file" if content is None else f"{file} is damaged, or neither"
    refused(lambda: FrozenViT(small(name), 224, str(tmp_path / file)), words)


def test_a_torchscript_archive_is_refused_with_the_way_out(tmp_path):
    """As openai/CLIP publishes its weights."""
    path = tmp_path / "ViT-L-14.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"ViT-L-14/{name}", b"")
    words = r"is a TorchScript archive.*jit\.load\('.*L-14\.pt"
    refused(lambda: FrozenViT(small("clip-vit-L"), 224, str(path)), words)


def test_files_of_the_old_format_are_read(tmp_path):
    """torch.save before 1.6, which cannot be mapped; with flags, which are no code."""
    content = plain.dino_checkpoint(random_weights(OFFICIAL["dinov1-vit-b"]))
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
    words = [recipe.name, re.escape(f"--enc-weights FILE, where FILE is {recipe.file}")]
    if recipe.hub:
        config = timm.get_pretrained_cfg(recipe.model.format(size=recipe.input_sizes[256]))
        source = re.escape(config.hf_hub_id or config.url)
        words += ["neither in the local cache", f"fetched from {source}; give"]
    refused(lambda: encoders.load(recipe.name, 256, "cpu"), *words, error=kind)


def test_a_run_loads_each_encoder_from_its_file(monkeypatch, tmp_path):
    names, paths, weights = ("dinov2-vit-s", "mae-vit-l"), [], {}
    for name in names:
        monkeypatch.setitem(REGISTRY, name, small(name))
        weights[name] = random_weights(OFFICIAL[name])
        paths.append(str(tmp_path / f"{name}.pth"))
        torch.save(OFFICIAL[name].layout(weights[name]), paths[-1])
    config = TrainConfig(enc_type=",".join(names), enc_weights=",".join(paths), resolution=256)
    alignment = Encoders(config)
    alignment.load(World(0, 1, torch.device("cpu")))
    for name in names:
        tokens = alignment.encoders[name](pictures(256))
        expected = plain.official_tokens(
            OFFICIAL[name], weights[name], pictures(256), torch.float32
        )
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
