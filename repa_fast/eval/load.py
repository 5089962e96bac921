"""A model for sampling and analysis, from any weights people have."""

import argparse
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from repa_fast.checkpoint import formats
from repa_fast.checkpoint.formats import Shape
from repa_fast.checkpoint.info import newest_checkpoint
from repa_fast.configs.config import TrainConfig, from_saved
from repa_fast.configs.model import model_class
from repa_fast.data.dataset import Metadata
from repa_fast.data.official import SD_VAE_FACTOR, SD_VAE_SCALE
from repa_fast.diffusion.ddpm import trained_path
from repa_fast.diffusion.path import Path as DiffusionPath
from repa_fast.models.sit import SIZES, SiT, size

HASH_DIGITS = 8


@dataclass(frozen=True)
class Loaded:
    """A model with the averaged weights, in eval mode, without gradients and projectors.

    Attributes:
        metadata: of the dataset it was trained on, as far as it is known.
        objective: flow, or ddpm for a DiT.
        path_type, prediction: of its training, for flow.
        name: of its architecture, fit for a file name.
        step: optimizer steps of the training; None where the file does not say.
        digest: the first hexadecimal digits of a SHA-256 of the weights.
        source: file or checkpoint.
    """

    model: SiT
    metadata: Metadata
    path_type: str
    prediction: str
    name: str
    step: int | None
    digest: str
    source: Path
    objective: str = "flow"

    @property
    def path(self) -> DiffusionPath:
        """From data to noise, as it was trained."""
        return trained_path(self.objective, self.path_type)


def load(
    source: str | Path,
    device: torch.device | str = "cpu",
    *,
    origin: str = "repa",
    model: str = "",
    num_heads: int = 0,
    prediction: str = "",
) -> Loaded:
    """The model of a run, a native checkpoint, an official .pt file, bare weights or safetensors.

    Args:
        source: of a run's folder the newest complete checkpoint is taken.
        origin: "repa" (and ours), "sit" or "dit" for the original SiT's or DiT's weights.
        model: SiT-{S,B,L,XL}/{2,4,8}, to be checked; known from the weights otherwise.
        num_heads: of an architecture that is none of those and whose file does not say.
        prediction: v, score or noise; what the file says, or v, where empty.

    Raises:
        ValueError: there are no weights, they are of another model, origin or number of heads than
            said, or that number is not known.
    """
    source = Path(source)
    if not source.exists():
        raise ValueError(f"{source} does not exist, expected a run, a checkpoint or a weight file")
    if source.is_dir():
        source = newest_checkpoint(source)
        if origin != "repa":
            raise ValueError(f"{source} is a native checkpoint, expected origin repa, got {origin}")
    config, step, metadata = _described(source)
    objective = "ddpm" if origin == "dit" else config.get("objective", "flow")
    prediction = _ours(prediction or config.get("prediction", "v"))
    state = formats.read_weights(
        source, origin, learn_sigma=objective == "ddpm", prediction=prediction
    )
    shape = formats.shape_of(state)
    heads = _heads(shape, config, source, num_heads)
    _expect_model(model, shape, heads, source)
    state = {name: t for name, t in state.items() if not name.startswith("projectors.")}
    built = _build(shape, heads, objective)
    formats.load_exactly(built, state, str(source))
    return Loaded(
        model=built.to(device).eval().requires_grad_(False),
        metadata=metadata or _expected_metadata(shape, config),
        path_type=_ours(config.get("path_type", "linear")),
        prediction=prediction,
        name=_name(shape, heads).replace("SiT", "DiT" if objective == "ddpm" else "SiT"),
        step=step,
        digest=digest(state),
        source=source,
        objective=objective,
    )


def digest(state: formats.State) -> str:
    """The first hexadecimal digits of a SHA-256 over names, shapes and values."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous().float()
        sha.update(f"{name} {tuple(tensor.shape)}".encode())
        sha.update(tensor.numpy())
    return sha.hexdigest()[:HASH_DIGITS]


def _described(source: Path) -> tuple[dict, int | None, Metadata | None]:
    """Training arguments, step and dataset, as far as a checkpoint or file says them."""
    if source.is_dir():
        names = ("config", "counters", "dataset")
        config, counters, dataset = (
            json.loads((source / f"{name}.json").read_text()) for name in names
        )
        return config, counters["step"], Metadata.from_dict(dataset)
    if source.suffix == ".safetensors":
        beside = source.with_suffix(".json")
        described = json.loads(beside.read_text()) if beside.exists() else {}
        if described.keys() != {"model", "dataset"}:  # not that of `repa-fast export`
            return {}, None, None
        return described["model"], None, Metadata.from_dict(described["dataset"])
    contents = formats.read_file(source)
    if not isinstance(contents, dict):
        raise ValueError(f"{source} holds no weights but a {type(contents).__name__}")
    arguments, step = contents.get("args"), contents.get("steps")
    config = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    return config, step if isinstance(step, int) else None, None


def _build(shape: Shape, heads: int, objective: str) -> SiT:
    with torch.device("meta"):
        model = model_class(objective)(
            input_size=shape.grid * shape.patch_size,
            patch_size=shape.patch_size,
            in_channels=shape.in_channels,
            hidden_size=shape.hidden_size,
            depth=shape.depth,
            num_heads=heads,
            num_classes=shape.num_classes,
            z_dims=(),
            qk_norm=shape.qk_norm,
        )
    return model.to_empty(device="cpu")


def _ours(name: str) -> str:
    """A path or prediction by our name; the original SiT has two that are not ours."""
    return {"Linear": "linear", "velocity": "v"}.get(name, name)


def _heads(shape: Shape, config: dict, source: Path, said: int) -> int:
    known = config.get("num_heads") or _heads_of_size(shape, config)
    if known and said not in (0, known):
        raise ValueError(f"{source} has {known} heads, expected {said}")
    if not (known or said):
        raise ValueError(
            f"{source}: depth {shape.depth} and width {shape.hidden_size} are no known model's; "
            "the weights do not tell the number of heads, expected --num-heads"
        )
    return known or said


def _heads_of_size(shape: Shape, config: dict) -> int | None:
    """Of the model that the arguments name, or else of the size of that depth and width."""
    named = re.fullmatch(r"SiT-(\w+)/\d+", config.get("model", ""))
    if named and named[1] in SIZES:
        return SIZES[named[1]]["num_heads"]
    for known in SIZES.values():
        if (known["depth"], known["hidden_size"]) == (shape.depth, shape.hidden_size):
            return known["num_heads"]
    return None


def _expect_model(model: str, shape: Shape, heads: int, source: Path) -> None:
    if not model:
        return
    expected = size(model)
    found = {
        "depth": shape.depth,
        "hidden_size": shape.hidden_size,
        "num_heads": heads,
        "patch_size": shape.patch_size,
    }
    if found != expected:
        raise ValueError(f"{source} holds a {shape}, expected {model}")


def _name(shape: Shape, heads: int) -> str:
    for name, known in SIZES.items():
        if (known["depth"], known["hidden_size"]) == (shape.depth, shape.hidden_size):
            return f"SiT-{name}-{shape.patch_size}"
    return f"SiT-d{shape.depth}-w{shape.hidden_size}-h{heads}-p{shape.patch_size}"


def _expected_metadata(shape: Shape, config: dict) -> Metadata:
    """Of pixels where latents are as large as images, or else of Stable Diffusion's latents."""
    side = shape.grid * shape.patch_size
    pixels = config.get("resolution") == side
    return Metadata(
        resolution=side if pixels else side * SD_VAE_FACTOR,
        latent_shape=(shape.in_channels, side, side),
        vae="none" if pixels else "sd-vae-ft-mse",
        scale=1.0 if pixels else SD_VAE_SCALE,
        bias=0.0,
        class_names=tuple(str(label) for label in range(shape.num_classes)),
    )


def run_config(source: Path) -> TrainConfig:
    """The training config in a native checkpoint."""
    return from_saved(json.loads((source / "config.json").read_text()))
