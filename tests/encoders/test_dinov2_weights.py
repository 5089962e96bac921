"""Weight files of DINOv2, against a plain forward pass written from the official architecture."""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F

from repa_fast import encoders
from repa_fast.configs.config import TrainConfig
from repa_fast.distributed import World
from repa_fast.encoders.recipes import dinov2
from repa_fast.encoders.vit import FrozenViT, load_file
from repa_fast.objective.encoders import Encoders
from repa_fast.testing import assert_within_budget

timm = pytest.importorskip("timm")

HEADS = 6
TABLE = 37  # the official position embedding is for 518 pixels
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

Weights = dict[str, torch.Tensor]


def official_weights(width: int, depth: int, registers: int = 0, swiglu: int = 0) -> Weights:
    """Random weights, named and shaped as in the official files; `swiglu` is its hidden width."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + TABLE**2, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if registers:
        shapes["register_tokens"] = (1, registers, width)
    block = {
        "norm1": (width,),
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "norm2": (width,),
    }
    if swiglu:
        block |= {"mlp.w12": (2 * swiglu, width), "mlp.w3": (width, swiglu)}
    else:
        block |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for index in range(depth):
        for name, shape in block.items():
            shapes[f"blocks.{index}.{name}.weight"] = shape
            shapes[f"blocks.{index}.{name}.bias"] = shape[:1]
        shapes[f"blocks.{index}.ls1.gamma"] = shapes[f"blocks.{index}.ls2.gamma"] = (width,)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if "norm" in name or "gamma" in name or name.endswith("bias"):
            values = 0.2 * values + (1 if "norm" in name and name.endswith("weight") else 0)
        elif name not in ("cls_token", "pos_embed", "register_tokens"):
            values = values / math.prod(shape[1:]) ** 0.5
        if not name.startswith(("blocks", "norm")):
            values = 0.02 * values  # a small stream shows the epsilon of the norms
        weights[name] = values
    return weights


def official_tokens(
    weights: Weights, images: torch.Tensor, side: int, dtype: torch.dtype
) -> torch.Tensor:
    """x_norm_patchtokens of the normalised and resized images, as REPA has them."""
    p = {name: value.to(dtype) for name, value in weights.items()}
    x = (images.to(dtype) / 255 - MEAN.to(dtype)) / STD.to(dtype)
    x = F.interpolate(x, (side, side), mode="bicubic")
    grid, width = side // 14, p["cls_token"].shape[-1]
    patches = x.unfold(2, 14, 14).unfold(3, 14, 14)  # (B, 3, grid, grid, 14, 14)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ p["patch_embed.proj.weight"].flatten(1).T + p["patch_embed.proj.bias"]
    table = p["pos_embed"][:, 1:].reshape(1, TABLE, TABLE, width).permute(0, 3, 1, 2)
    table = F.interpolate(table, (grid, grid), mode="bicubic", antialias=True)
    x = x + table.flatten(2).transpose(1, 2)
    lead = [p["cls_token"] + p["pos_embed"][:, :1]]
    if "register_tokens" in p:
        lead.append(p["register_tokens"])
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in lead), x], dim=1)

    def norm(x, name):
        return F.layer_norm(x, (width,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    for index in range(sum(name.endswith("ls1.gamma") for name in p)):
        block = f"blocks.{index}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.unflatten(-1, (3, HEADS, width // HEADS)).permute(2, 0, 3, 1, 4)
        weight = (q @ k.transpose(-1, -2) * (width // HEADS) ** -0.5).softmax(-1)
        mixed = (weight @ v).transpose(1, 2).flatten(2)
        x = x + p[f"{block}.ls1.gamma"] * linear(mixed, f"{block}.attn.proj")
        hidden = norm(x, f"{block}.norm2")
        if f"{block}.mlp.w12.weight" in p:
            gate, value = linear(hidden, f"{block}.mlp.w12").chunk(2, dim=-1)
            hidden = linear(gate * gate.sigmoid() * value, f"{block}.mlp.w3")
        else:
            hidden = linear(hidden, f"{block}.mlp.fc1")
            hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
            hidden = linear(hidden, f"{block}.mlp.fc2")
        x = x + p[f"{block}.ls2.gamma"] * hidden
    return norm(x, "norm")[:, len(lead) - 1 + lead[-1].shape[1] :]


def pictures(resolution: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (1, 3, resolution, resolution)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def assert_official(tokens: torch.Tensor, weights: Weights, resolution: int, side: int) -> None:
    oracle, working = (
        official_tokens(weights, pictures(resolution), side, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert tokens.shape == (1, (side // 14) ** 2, weights["norm.bias"].numel())
    assert_within_budget("patch tokens", tokens, oracle, working)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Official files of the small sizes: registers -> (path, weights)."""
    folder = tmp_path_factory.mktemp("weights")
    made = {}
    for registers in (0, 4):
        weights = official_weights(384, 12, registers)
        made[registers] = (folder / f"reg{registers}.pth", weights)
        torch.save(weights, made[registers][0])
    return made


@pytest.fixture
def refused(tmp_path):
    """(weights, expected message) -> their file must be refused for dinov2-vit-s."""

    def check(weights: object, message: str) -> None:
        path = tmp_path / "given.pth"
        torch.save(weights, path)
        with pytest.raises(ValueError, match=message):
            encoders.load("dinov2-vit-s", 256, "cpu", str(path))

    return check


@pytest.mark.parametrize(
    "name, registers, resolution, side",
    [
        ("dinov2-vit-s", 0, 256, 224),
        ("dinov2-vit-s", 0, 512, 448),
        ("dinov2reg-vit-s", 4, 256, 224),
    ],
)
def test_an_official_file_gives_the_official_tokens(files, name, registers, resolution, side):
    path, weights = files[registers]
    run = TrainConfig(enc_type=name, enc_weights=str(path), resolution=resolution)
    alignment = Encoders(run)
    alignment.load(World(0, 1, torch.device("cpu")))
    encoder = alignment.encoders[name]
    tokens = encoder(pictures(resolution))
    assert_official(tokens, weights, resolution, side)
    assert not tokens.requires_grad


@pytest.mark.parametrize("registers", [0, 4])
def test_the_giant_with_its_swiglu(tmp_path, registers):
    weights = official_weights(96, 2, registers, swiglu=256)
    torch.save(weights, tmp_path / "giant.pth")
    name = f"vit_giant_patch14_{'reg4_' if registers else ''}dinov2"
    vit = timm.create_model(name, img_size=224, num_classes=0, embed_dim=96, num_heads=6, depth=2)
    load_file(vit, tmp_path / "giant.pth", dinov2("g", bool(registers)))
    with torch.no_grad():
        x = F.interpolate((pictures(256) / 255 - MEAN) / STD, (224, 224), mode="bicubic")
        tokens = vit.eval().forward_features(x)[:, 1 + registers :]
    assert_official(tokens, weights, 256, 224)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_file_of_timm_gives_the_same_tokens(files, tmp_path, registers, suffix):
    from safetensors.torch import save_file

    path, _ = files[registers]
    vit = timm.create_model(
        f"vit_small_patch14_{'reg4_' if registers else ''}dinov2", img_size=518, num_classes=0
    )
    load_file(vit, path, dinov2("s", bool(registers)))
    state = {name: value.contiguous() for name, value in vit.state_dict().items()}
    copy = tmp_path / f"timm.{suffix}"
    save_file(state, copy) if suffix == "safetensors" else torch.save(state, copy)
    recipe = dinov2("s", bool(registers))
    of_timm, official = FrozenViT(recipe, 224, str(copy)), FrozenViT(recipe, 224, str(path))
    assert torch.equal(of_timm(pictures(256)), official(pictures(256)))


def test_another_size_is_named(files, refused):
    refused(official_weights(768, 12), "holds dinov2-vit-b, expected dinov2-vit-s")
    refused(files[4][1], "holds dinov2reg-vit-s, expected dinov2-vit-s")
    refused(official_weights(96, 2), "a ViT of width 96, depth 2, .* expected dinov2-vit-s")


def test_what_is_missing_or_too_much_is_named(files, refused):
    _, weights = files[0]
    part = {name: value for name, value in weights.items() if ".ls2." not in name}
    refused(part, r"holds dinov2-vit-s, but lacks 12: blocks.0.ls2.gamma, .*, \.\.\.$")
    refused(weights | {"head.weight": torch.zeros(3)}, "but also has 1: head.weight")
    refused(weights | {"norm.weight": torch.zeros(5)}, r"norm.weight \(5,\), expected \(384,\)")
    del part["pos_embed"]
    refused(part, "not a DINOv2 state dict: expected pos_embed, got blocks.0")


def test_other_files_are_refused(refused, tmp_path):
    refused(
        {"cls_token": 3}, "not a DINOv2 state dict: expected patch_embed.proj.weight, cls_token"
    )
    refused(torch.zeros(3), "cannot be read")
    refused({"model": argparse.Namespace()}, "cannot be read")  # not weights only
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("<html>404</html>")
        with pytest.raises(ValueError, match=rf"{name} cannot be read"):
            encoders.load("dinov2-vit-s", 256, "cpu", str(tmp_path / name))
    with pytest.raises(ValueError, match=r"absent\.pth is not a file"):
        encoders.load("dinov2-vit-s", 256, "cpu", str(tmp_path / "absent.pth"))


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
