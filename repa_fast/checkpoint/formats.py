"""Weight files people have: what they hold, whose they are, and how they become ours.

Read: native checkpoint directories, the official {model, ema, opt, args, steps} files, bare state
dicts, safetensors; REPA's, with `decoder_blocks` names too, and the original SiT's and DiT's. No
code in a file is run: torch.load is called with weights_only.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from repa_fast.checkpoint.layout import MOST, expect_weights, read_native, weights_of
from repa_fast.checkpoint.marker import checksum
from repa_fast.contracts import expect_choice
from repa_fast.distributed import shard_like
from repa_fast.encoders import files
from repa_fast.models.embed import T_FREQUENCIES
from repa_fast.models.sit import PATCH_SIZES, SIZES
from repa_fast.whole import parse_json, read_regular
from repa_fast.words import short

State = dict[str, torch.Tensor]

SIGN_REVERSED = {"v": -1, "score": 1, "noise": 1}
"""What a prediction is multiplied by where time runs the other way."""
LABELS = "y_embedder.embedding_table.weight"
AXES = {"pos_embed": 3, "x_embedder.proj.weight": 4, LABELS: 2, "t_embedder.mlp.0.weight": 2}
AXES |= {"final_layer.linear.weight": 2, "final_layer.linear.bias": 1}
"""What every SiT and DiT has, by the number of axes."""


@dataclass(frozen=True)
class Shape:
    """The model a state dict belongs to, as far as its tensors tell; they do not tell the heads."""

    hidden_size: int
    depth: int
    patch_size: int
    in_channels: int
    out_channels: int
    grid: int
    num_classes: int
    z_dims: tuple[int, ...]
    qk_norm: bool

    def __str__(self) -> str:
        known = {(s["depth"], s["hidden_size"]): name for name, s in SIZES.items()}
        name = known.get((self.depth, self.hidden_size))
        head = f"SiT-{name}/{self.patch_size}" if name and self.patch_size in PATCH_SIZES else "SiT"
        side = self.grid * self.patch_size
        parts = [
            f"depth {self.depth}, width {self.hidden_size}, patch {self.patch_size}",
            f"{side}x{side}x{self.in_channels} latents",
            f"{self.num_classes} classes",
            f"projectors to {', '.join(map(str, self.z_dims))}" if self.z_dims else "no projector",
        ]
        if self.qk_norm:
            parts.append("qk-norm")
        if self.out_channels != self.in_channels:
            parts.append(f"{self.out_channels} output channels (an original SiT or DiT)")
        return f"{head} ({'; '.join(parts)})"


def shape_of(state: State) -> Shape:
    """Return the architecture that a state dict in our names belongs to.

    ValueError names the tensors that every SiT and DiT has, if they are missing or misshapen, or
    says what there is none of.
    """
    if missing := files.lacking(state, AXES):
        raise ValueError(
            f"not the weights of a SiT or DiT: {', '.join(missing)} missing, or with other axes"
        )
    width, channels, patch, across = state["x_embedder.proj.weight"].shape
    rows, biases = (len(state[f"final_layer.linear.{name}"]) for name in ("weight", "bias"))
    times = state["t_embedder.mlp.0.weight"].shape[1]
    if not patch or rows % patch**2 or rows != biases or times != T_FREQUENCIES:
        raise ValueError(
            f"not the weights of a SiT or DiT: patches of {patch} pixels, {rows} outputs with "
            f"{biases} biases, {times} features of time, expected {T_FREQUENCIES} and outputs for "
            "each pixel"
        )
    positions, classes = state["pos_embed"].shape[1], len(state[LABELS]) - 1
    grid, depth = math.isqrt(positions), _depth(state)
    wrong = {
        f"depth {depth}, expected blocks": depth < 1,
        f"width {width} and {channels} channels, expected some": not (width and channels and rows),
        f"patches of {patch}x{across} pixels, expected a square": patch != across,
        f"{positions} positions in pos_embed, expected a square": not grid or grid**2 != positions,
        f"{classes + 1} rows in {LABELS}, expected one a class and one more": classes < 1,
    }
    if found := next((words for words, is_so in wrong.items() if is_so), ""):
        raise ValueError(f"not the weights of a SiT or DiT: {found}")
    heads = [name for name in state if re.fullmatch(r"projectors\.\d+\.4\.weight", name)]
    heads = sorted(set(heads) - set(files.lacking(state, dict.fromkeys(heads, 2))))
    return Shape(
        hidden_size=width,
        depth=depth,
        patch_size=patch,
        in_channels=channels,
        out_channels=rows // patch**2,
        grid=grid,
        num_classes=classes,
        z_dims=tuple(len(state[name]) for name in heads),
        qk_norm="blocks.0.attn.q_norm.weight" in state,
    )


def read_file(path: Path) -> dict:
    """Read a .safetensors or torch file; errors are those of `files.load_safely`.

    ValueError too if the number of steps of an official file is none, or if weights have another
    checksum than `repa-fast export` has written beside them.
    """
    beside = path.with_suffix(".json")
    if path.suffix == ".safetensors" and beside.is_file():
        described = parse_json(read_regular(beside), beside)
        expected = described.get("crc32") if isinstance(described, dict) else None
        if isinstance(expected, int) and expected != checksum(path):
            raise ValueError(f"{path} is damaged: it has another checksum than {beside.name} says")
    contents = files.load_safely(path, allow_namespace=True)
    steps = contents.get("steps", 0)
    if type(steps) is not int or not 0 <= steps <= MOST:
        raise ValueError(f"{path}: steps is {short(steps)}, expected an integer from 0 to 2**40")
    return contents


def read_weights(
    path: Path, origin: str = "repa", weights: str = "ema", **kept: bool | str
) -> State:
    """Read a set of weights of a .pt or .safetensors file or a native checkpoint.

    `weights` is that of `chosen_in`; `origin` and `kept` are those of `normalise`, which says what
    is returned and raised.
    """
    if path.is_dir():
        expect_weights(path, weights, weights_of(path))
        contents = read_native(path, f"{weights}.")
    else:
        contents = read_file(path)
        weights = chosen_in(contents, weights, path)
    try:
        state = contents if path.is_dir() else weights_in(contents, weights)
        return normalise(state, origin, **kept)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def chosen_in(contents: dict, weights: str, source: Path) -> str:
    """Return the name of the set of weights that is meant in a file; "" of bare weights.

    "ema", the default, means the only set of a file too; ValueError if another one is not there.
    """
    there = [name for name in ("model", "ema") if isinstance(contents.get(name), dict)]
    if weights == "ema" and weights not in there:
        return there[0] if there else ""
    if not there:
        raise ValueError(
            f"{source} holds a single set of weights, expected ema, the default, got {weights}"
        )
    expect_weights(source, weights, there)
    return weights


def weights_in(contents: dict, weights: str = "ema") -> State:
    """Return a set of weights in a file, or the model where there is none, or all of bare ones."""
    return files.unwrap(contents, weights, "model")


def normalise(
    state: State,
    origin: str = "repa",
    *,
    with_head: bool = False,
    learn_sigma: bool = False,
    prediction: str = "v",
) -> State:
    """Turn a state dict as it lies in a file into our names, shapes and convention of time.

    Args:
        origin: "repa" for REPA's and ours; "sit" for the original SiT, whose time and sign run the
            other way and are turned; "dit" for the original DiT, whose trunk alone means the same.
        with_head: keep SRA's head, which only training needs.
        learn_sigma: keep the second half of the output channels, DiT's variances.
        prediction: of the model; a velocity changes its sign with the direction of time.

    Raises:
        ValueError: not a SiT or DiT, or of another origin than said; or values that are no weights,
            by `files.unwrap` and `files.expect_real`.
    """
    expect_choice("origin", origin, ("repa", "sit", "dit"))
    expect_choice("prediction", prediction, tuple(SIGN_REVERSED))
    if not isinstance(state, dict):
        raise ValueError(f"the weights are a {type(state).__name__}, expected tensors by name")
    state = _rename_legacy(files.unwrap(state))
    if not with_head:
        state = {name: t for name, t in state.items() if not name.startswith("ap_head.")}
    shape = shape_of(state)
    files.expect_real(state)
    doubled = shape.out_channels == 2 * shape.in_channels
    if doubled and learn_sigma:
        return state
    if doubled and origin == "repa":
        raise ValueError(
            f"the final layer has {shape.out_channels} channels, expected {shape.in_channels}: "
            "these are the weights of the original SiT or DiT; say which (origin sit or dit)"
        )
    if doubled:
        state = _drop_sigma(state, shape)
    return _reverse_time(state, prediction) if origin == "sit" else state


def _rename_legacy(state: State) -> State:
    """Rename decoder_blocks.i, REPA's first names, to blocks.(i + encoder depth)."""
    first = _depth(state)

    def rename(name: str) -> str:
        return re.sub(
            r"^decoder_blocks\.(\d{1,6})(?!\d)", lambda m: f"blocks.{int(m[1]) + first}", name
        )

    renamed = {rename(name): tensor for name, tensor in state.items()}
    if len(renamed) < len(state):
        raise ValueError("decoder_blocks have the numbers of blocks, expected those after them")
    return renamed


def _depth(state: State) -> int:
    return len({name.split(".")[1] for name in state if name.startswith("blocks.")})


def _drop_sigma(state: State, shape: Shape) -> State:
    """Keep the first half of the output channels of every patch: the velocity or the noise."""
    state = dict(state)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[name].unflatten(0, (shape.patch_size**2, shape.out_channels))
        state[name] = rows[:, : shape.in_channels].flatten(0, 1).clone()
    return state


def _reverse_time(state: State, prediction: str) -> State:
    """Fold v(x, t) = -v_SiT(x, 1 - t) into the weights; scores and noise keep their sign.

    The features of 1 - t are a fixed linear map of those of t, since cos((1-t)w) and sin((1-t)w)
    are combinations of cos(tw) and sin(tw); the map goes into the first linear layer, in fp64.
    """
    state = dict(state)
    half = T_FREQUENCIES // 2
    exponents = torch.arange(half, dtype=torch.float64) / half
    frequency = torch.exp(-math.log(10000.0) * exponents)
    cos, sin = frequency.cos(), frequency.sin()
    name = "t_embedder.mlp.0.weight"
    of_cos, of_sin = state[name].double().split(half, dim=1)
    turned = torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1)
    state[name] = turned.to(state[name].dtype)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name] = SIGN_REVERSED[prediction] * state[name]
    return state


def load_exactly(model: torch.nn.Module, state: State, source: str) -> None:
    """Load every tensor into a model of exactly that shape.

    ValueError says how many names or shapes differ, and the model `source` seems to hold.
    """
    expect_fitting(model, state, source)
    own = model.state_dict()
    model.load_state_dict({name: shard_like(state[name], tensor) for name, tensor in own.items()})


def expect_fitting(model: torch.nn.Module, state: State, source: str) -> None:
    """Raise the ValueError of `load_exactly`, and load nothing."""
    own = model.state_dict()
    if problems := files.differences(state, own):
        raise ValueError(
            f"{source} does not fit the model, it {'; '.join(problems)}. It seems to hold a "
            f"{shape_of(state)}; the model is a {shape_of(own)}"
        )


def initialise_from(model: torch.nn.Module, state: State, source: str) -> list[str]:
    """Start a new run from weights of another one; return what was not taken over, as sentences.

    The position table is the model's own at another resolution; the label table and projectors
    keep their initial values where the classes or encoders differ. All else must fit, as for
    `load_exactly`.
    """
    own, merged, dropped = model.state_dict(), dict(state), []
    ours, theirs = shape_of(own), shape_of(state)
    notes = {
        "pos_embed": f"position table recomputed for {ours.grid}x{ours.grid} patches, "
        f"the file has {theirs.grid}x{theirs.grid}",
        LABELS: f"label table starts anew with {ours.num_classes} classes, "
        f"the file has {theirs.num_classes}",
        "projectors.": f"projectors start anew (to {ours.z_dims or 'none'}), "
        f"the file's (to {theirs.z_dims or 'none'}) are dropped",
        "ap_head.": "the head of self-alignment starts anew, or is dropped",
    }
    for prefix, note in notes.items():
        kept, given = ({n: t for n, t in s.items() if n.startswith(prefix)} for s in (own, state))
        if files.differences(given, kept):
            merged = {n: t for n, t in merged.items() if n not in given} | kept
            dropped.append(note)
    load_exactly(model, merged, source)
    return dropped
