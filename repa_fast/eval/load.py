"""A model for sampling and analysis, from any weights people have."""

import argparse
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from repa_fast.checkpoint import formats, hub
from repa_fast.checkpoint.formats import Shape
from repa_fast.checkpoint.layout import DATASET, WEIGHTS, newest_checkpoint, read_settings
from repa_fast.checkpoint.marker import trusted
from repa_fast.configs.objective import ObjectiveConfig
from repa_fast.data.dataset import Metadata
from repa_fast.data.features import TEXT, UNSIGNED, describing
from repa_fast.data.latents import can_decode
from repa_fast.data.official import SD_VAE_FACTOR, SD_VAE_SCALE
from repa_fast.models.sit import SIZES, SiT, size
from repa_fast.objective import Objective, build_objective
from repa_fast.whole import parse_json, read_regular
from repa_fast.words import short

HASH_DIGITS = 8
LONGEST_STEM = 24
"""Letters of a weight file's name that go into names of what is made of it."""
KINDS = dict.fromkeys(("objective", "path_type", "prediction", "model"), TEXT)
KINDS |= dict.fromkeys(("num_heads", "resolution"), UNSIGNED)
"""Of the training arguments that are looked at, by name."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model that can be sampled, in eval mode.

    Attributes:
        metadata: of the dataset it was trained on, as far as it is known.
        objective: what it predicts.
    """

    model: SiT
    metadata: Metadata
    objective: Objective


@dataclass(frozen=True, kw_only=True)
class Loaded(Trained):
    """A model read from a file, without gradients and projectors.

    Attributes:
        name: of its architecture, fit for a file name.
        step: optimizer steps of the training; None where the file does not say.
        weights: model, ema, ema_2 and so on; "" where the file does not say.
        digest: the first hexadecimal digits of a SHA-256 of the weights.
        source: file or checkpoint.
    """

    name: str
    step: int | None
    weights: str
    digest: str
    source: Path

    @property
    def place(self) -> str:
        """Step and weights, where these are not the EMA's, or the file's name, for file names."""
        if self.step is None:
            return self.source.stem[:LONGEST_STEM]
        return f"{self.step:07d}{'' if self.weights in ('', 'ema') else f'-{self.weights}'}"


@dataclass(kw_only=True)
class WeightsConfig:
    """Which weights a command is about."""

    ckpt: str
    """A run's folder, a native checkpoint, an official .pt file, bare weights or safetensors, a
    folder that `repa-fast share` wrote, or owner/name of one on the Hugging Face hub."""
    weights: str = "ema"
    """model (those that are trained), ema, or ema_2 and so on of a run with several EMAs. A
    file's only set is taken for ema."""
    origin: Literal["repa", "sit", "dit"] = "repa"
    """Whose weights CKPT holds: REPA's or ours, or the original SiT's or DiT's."""
    num_heads: int = 0
    """Of an architecture that is no SiT-{S,B,L,XL} and whose file does not say."""
    verify: bool = True
    """Compare checksums of what is read of a native checkpoint; otherwise read it as it is."""

    def load(self, device: torch.device, **options: str) -> "Loaded":
        """Load them; `options` and errors are those of `load`."""
        with trusted(not self.verify):
            known = {"weights": self.weights, "origin": self.origin, "num_heads": self.num_heads}
            return load(self.ckpt, device, **known, **options)


def load(
    source: str | Path,
    device: torch.device | str = "cpu",
    *,
    weights: str = "ema",
    origin: str = "repa",
    model: str = "",
    num_heads: int = 0,
    prediction: str = "",
) -> Loaded:
    """Load the model of a run, a native checkpoint, an official .pt file, or bare weights.

    Args:
        source: one of these, a .safetensors file, a shared folder, or owner/name on the hub, as of
            `hub.find`; of a run's folder the newest complete checkpoint is taken.
        weights: model, ema, ema_2 and so on; a file's only set is taken for ema.
        origin: "repa" (and ours), "sit" or "dit" for the original SiT's or DiT's weights.
        model: SiT-{S,B,L,XL}/{2,4,8}, to be checked; known from the weights otherwise.
        num_heads: of an architecture that is none of those and whose file does not say.
        prediction: v, score or noise; what the file says, or v, where empty.

    Raises:
        ValueError: there are no such weights, they are of another model, origin or number of heads
            than said, or that number is not known; or there is no such path.
        Failure: a repository cannot be fetched from the hub.
    """
    source = hub.find(source)
    if source.is_dir():
        source = newest_checkpoint(source)
    config, step, metadata, known_as = described(source, weights)
    if metadata is not None and origin != "repa":
        raise ValueError(f"{source} is of repa-fast, expected origin repa, got {origin}")
    predicted = {
        "objective": "ddpm" if origin == "dit" else config.get("objective", "flow"),
        "path_type": _ours(config.get("path_type", "linear")),
        "prediction": _ours(prediction or config.get("prediction", "v")),
    }
    with describing(str(source)):
        objective = build_objective(ObjectiveConfig(**predicted))
    kept = {"learn_sigma": objective.model is not SiT, "prediction": objective.prediction}
    state = formats.read_weights(source, origin, weights, **kept)
    shape = formats.shape_of(state)
    arguments = _arguments(shape, config, num_heads, source)
    if metadata is not None:
        expect_same(source, metadata, shape)
    if model and size(model) != {name: arguments[name] for name in size(model)}:
        raise ValueError(f"{source} holds a {shape}, expected {model}")
    state = {name: t for name, t in state.items() if not name.startswith("projectors.")}
    return Loaded(
        model=_built(objective, arguments, state, source).to(device),
        metadata=metadata or _expected_metadata(shape, config),
        objective=objective,
        name=f"{objective.model.__name__}-{_name(shape, arguments['num_heads'])}",
        step=step,
        weights=known_as,
        digest=digest(state),
        source=source,
    )


def _built(objective: Objective, arguments: dict, state: formats.State, source: Path) -> SiT:
    """Return the model of these arguments and weights, on the CPU; ValueError as of `load`."""
    with torch.device("meta"):
        built = objective.model(**arguments, z_dims=())
    built = built.to_empty(device="cpu")
    formats.load_exactly(built, state, str(source))
    return built.eval().requires_grad_(False)


def digest(state: formats.State) -> str:
    """Return the first hexadecimal digits of a SHA-256 over names, shapes and values."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous().float()
        sha.update(f"{name} {tuple(tensor.shape)}".encode())
        sha.update(tensor.numpy())
    return sha.hexdigest()[:HASH_DIGITS]


def described(source: Path, weights: str) -> tuple[dict, int | None, Metadata | None, str]:
    """Return training arguments, step, dataset and weights, as far as what is read says them."""
    if source.is_dir():
        settings = read_settings(source)
        return settings.config.to_dict(), settings.counters["step"], settings.metadata, weights
    if source.suffix == ".safetensors":
        return _exported(_description_of(source))
    contents = formats.read_file(source)
    arguments = contents.get("args")
    config = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    with describing(str(source)):
        _expect_kinds(config)
        ours = config.get("dataset")  # of `repa-fast export`, which others' arguments may have too
        metadata = Metadata.from_dict(ours) if isinstance(ours, dict) else None
    return config, contents.get("steps"), metadata, formats.chosen_in(contents, weights, source)


def _description_of(weights: Path) -> Path:
    """Return the file that describes safetensors: one of their name, or a shared folder's."""
    own, shared = weights.with_suffix(".json"), weights.with_name(hub.CONFIG)
    return shared if weights.name == hub.WEIGHTS_FILE and not own.exists() else own


def _exported(beside: Path) -> tuple[dict, int | None, Metadata | None, str]:
    """Return what was written beside weights that are shared, or nothing of another program's.

    ValueError if it is no JSON, or not as it was written.
    """
    with describing(str(beside)):
        written = parse_json(read_regular(beside), "it") if beside.is_file() else {}
        if not isinstance(written, dict):
            raise ValueError(f"holds a {type(written).__name__}, expected values by name")
        if not {"model", "dataset"} <= written.keys():
            return {}, None, None, ""
        parts = written["model"], written.get("objective", {})
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError("model or objective is no dictionary, expected values by name")
        config = parts[0] | parts[1]
        _expect_kinds(config)
        weights = written.get("weights", "ema")
        if not (isinstance(weights, str) and (not weights or WEIGHTS.fullmatch(weights))):
            raise ValueError(f"weights is {short(weights)}, expected model, ema, ema_2 or so")
        step = written.get("step")
        if step is not None and not UNSIGNED[1](step):
            raise ValueError(f"step is {short(step)}, expected {UNSIGNED[0]}")
        return config, step, Metadata.from_dict(written["dataset"]), weights


def _expect_kinds(config: dict) -> None:
    """Raise ValueError unless those training arguments that are looked at are of their kind."""
    for name, (words, fits) in KINDS.items():
        if name in config and not fits(config[name]):
            raise ValueError(f"{name} is {short(config[name])}, expected {words}")


def expect_same(source: Path, metadata: Metadata, shape: Shape) -> None:
    """Raise ValueError that names the file with the dataset if that is not the weights'."""
    beside = source / DATASET if source.is_dir() else source
    if source.suffix == ".safetensors":
        beside = _description_of(source)
    side = shape.grid * shape.patch_size
    latents, classes = (shape.in_channels, side, side), len(metadata.class_names)
    if tuple(metadata.latent_shape) != latents:
        found = tuple(metadata.latent_shape)
        raise ValueError(f"{beside}: latent_shape is {found}, expected {latents} (the weights')")
    if can_decode(metadata) and metadata.resolution != side:
        raise ValueError(f"{beside}: resolution is {metadata.resolution}, expected {side} (pixels)")
    if classes > shape.num_classes:
        raise ValueError(
            f"{beside}: {classes} class names, expected at most {shape.num_classes} (the weights')"
        )


def _ours(name: str) -> str:
    """Return a path or prediction by our name; the original SiT has two that are not ours."""
    return {"Linear": "linear", "velocity": "v"}.get(name, name)


def _arguments(shape: Shape, config: dict, num_heads: int, source: Path) -> dict:
    """Return the model's arguments: what its tensors tell, and the heads, which they do not.

    Those are the heads of the training arguments, of the model they name, or of the known model of
    that depth and width; `num_heads`, if not 0, must be the same.
    """
    named = re.sub(r"^SiT-|/\d+$", "", config.get("model", ""))
    arguments = SIZES.get(named) or SIZES.get(_size_of(shape), {})
    known = config.get("num_heads") or arguments.get("num_heads")
    if known and num_heads not in (0, known):
        raise ValueError(f"{source} has {known} heads, expected {num_heads}")
    if not (known or num_heads):
        raise ValueError(
            f"{source}: depth {shape.depth} and width {shape.hidden_size} are no known model's; "
            "the weights do not tell the number of heads, expected --num-heads"
        )
    if shape.hidden_size % (known or num_heads):
        raise ValueError(
            f"{source}: {known or num_heads} heads, expected a number that divides the width "
            f"{shape.hidden_size}"
        )
    return arguments_of(shape, known or num_heads)


def arguments_of(shape: Shape, num_heads: int) -> dict:
    """Return SiT's arguments, as its tensors tell them, of a model without projectors."""
    told = ("hidden_size", "depth", "patch_size", "in_channels", "num_classes", "qk_norm")
    side = shape.grid * shape.patch_size
    found = {name: getattr(shape, name) for name in told}
    return found | {"input_size": side, "num_heads": num_heads}


def _size_of(shape: Shape) -> str:
    """Return the letters of the known model of that depth and width; "" if there is none."""
    known = {(one["depth"], one["hidden_size"]): name for name, one in SIZES.items()}
    return known.get((shape.depth, shape.hidden_size), "")


def _name(shape: Shape, heads: int) -> str:
    if known := _size_of(shape):
        return f"{known}-{shape.patch_size}"
    return f"d{shape.depth}-w{shape.hidden_size}-h{heads}-p{shape.patch_size}"


def _expected_metadata(shape: Shape, config: dict) -> Metadata:
    """Return that of pixels where latents are as large as images, or of SD-VAE's latents."""
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
