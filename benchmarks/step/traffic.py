"""Launch sites of a training step and the bytes they move, counted without a GPU.

`python -m benchmarks.step.traffic` counts a block of the model (forward and backward), what runs
outside of the blocks, and the encoder, as for an H100, and prints them. `--write` replaces the
committed counts, with the times that nvidia-matmul-heuristics estimates for the matmuls; `--check`,
which a test runs, fails where a part launches more than these or moves over 2 % more.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.gpu.pretended import build
from benchmarks.harness.environment import ROOT, at_least
from benchmarks.harness.rows import append, grid, read
from benchmarks.step import matmuls
from benchmarks.step.launches import KINDS, Eager, Launch, compiled
from repa_fast import encoders, ops
from repa_fast.backend import dispatch
from repa_fast.configs import presets
from repa_fast.configs.build import build_model, expected_metadata, fit_to_data
from repa_fast.configs.config import TrainConfig
from repa_fast.data.dataset import Metadata
from repa_fast.distributed import World
from repa_fast.kernels.attention.backends import BACKENDS
from repa_fast.models.sit import SiT
from repa_fast.objective import build_alignment, build_objective
from repa_fast.train.leaves import add_leaves
from repa_fast.train.step import losses, synthetic_batch

PRESET, BACKEND = "sit-xl2-repa", "sdpa-cudnn"
FILE = ROOT / "benchmarks" / "results" / "offline" / "traffic.jsonl"
COMMITTED = tuple((batch, residual) for batch in (32, 128) for residual in ("fp32", "bf16"))
"""Images of a forward pass, and dtype of the residual stream."""
KEY = ("piece", "batch", "residual", "pass")
PASSES, ANY = ("forward", "backward"), "any"
HELD = ("elementwise", "stack", "casts")
MORE, LESS, SMALL = 1.02, 0.9, 0.5
"""A count above MORE of the committed one fails, and one below LESS of it, as that is stale; but
for SMALL megabytes."""
Counted = dict[str, list[Launch]]  # by pass, "forward" and "backward"


class Hole(torch.autograd.Function):
    """Stands for a block: results and gradients of its shapes, and no launch."""

    @staticmethod
    def forward(ctx, x: Tensor, branch: Tensor | None, gate: Tensor | None, modulation: Tensor):
        ctx.inputs = x, branch, gate, modulation
        ctx.set_materialize_grads(False)
        half = {"dtype": modulation.dtype}
        gate = modulation.new_empty(len(x), x.shape[-1])
        return torch.empty_like(x), torch.empty_like(x, **half), gate

    @staticmethod
    def backward(ctx, *_):
        return tuple(None if one is None else torch.empty_like(one) for one in ctx.inputs)


def prepared(config: TrainConfig, metadata: Metadata) -> SiT:
    """Return the model on "cuda" as a run in bf16 on one GPU has it, not compiled."""
    with torch.device("cuda"):
        model = build_model(config, metadata)
    if config.residual_dtype == "bf16":
        model.residual_dtype = torch.bfloat16
    add_leaves(model, joint=True)
    return model


def block(config: TrainConfig, metadata: Metadata, batch: int) -> Counted:
    """Count a block in the middle of the model."""
    model = prepared(config, metadata)
    width = model.pos_embed.shape[-1]

    def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, device="cuda", dtype=dtype, requires_grad=True)

    tokens = (batch, model.num_tokens, width)
    residual = made(*tokens, dtype=model.residual_dtype or torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        inputs = residual, made(*tokens), made(batch, width), made(batch, 6 * width)
        return compiled(model.blocks[1], *inputs)


def outside(config: TrainConfig, metadata: Metadata, batch: int) -> Counted:
    """Count what runs outside of blocks, encoder and optimizer: embedders, adaLN layers, losses."""
    model = prepared(config, metadata)
    for each in model.blocks:
        each.forward = Hole.apply
    alignment, device = build_alignment(config), torch.device("cuda")
    state = SimpleNamespace(
        config=config, metadata=metadata, objective=build_objective(config), alignment=alignment,
        ema=model, world=World(0, 1, device), aligns=bool(alignment.heads),
        autocast=partial(torch.autocast, "cuda", torch.bfloat16),
    )  # fmt: skip
    inputs = synthetic_batch(state, batch)
    for spec in encoders.specs(config.enc_type):
        shape = (batch, spec.num_tokens(config.resolution), spec.width)
        tokens = torch.empty(shape, device=device, dtype=torch.bfloat16)
        alignment.encoders[spec.name] = lambda images, tokens=tokens: tokens
    with Eager() as forward:
        denoise, others = losses(state, model, *inputs)
        loss = denoise.sum() + sum(0.5 * other.sum() for other in others)
    with Eager() as backward:
        loss.backward()
    return {"forward": forward.launches, "backward": backward.launches}


def encoder(config: TrainConfig, metadata: Metadata, batch: int) -> Counted:
    """Count the compiled encoders, their linear layers in bf16."""
    found: list[Launch] = []
    images = (batch, 3, config.resolution, config.resolution)
    for spec in encoders.specs(config.enc_type):
        with torch.device("cuda"):
            module = spec.build(spec.input_size(config.resolution), pretrained=False)
            pixels = torch.empty(images, dtype=torch.uint8)
        for layer in module.modules():
            if type(layer) is torch.nn.Linear:
                layer.bfloat16()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            found += compiled(module, pixels)["forward"]
    return {"forward": found}


PIECES = {"block": block, "outside": outside, "encoder": encoder}


def count(
    preset: str, batch: int, residual: str, pieces: Sequence[str], backend: str = BACKEND
) -> dict[tuple, list[Launch]]:
    """Return the launches of each pass of each piece, by the values of KEY, on the pretended card.

    The batch is that of a forward pass; attention runs on `backend`.
    """
    torch.backends.cuda.enable_cudnn_sdp(True)  # which pretending switches off, as it cannot run
    anyway = dataclasses.replace(BACKENDS[backend], probe=lambda: None)  # its package may be absent
    dispatch.use_kernels("triton")
    config, metadata = presets.get(preset), expected_metadata(presets.get(preset))
    config = dataclasses.replace(fit_to_data(config, metadata), residual_dtype=residual)
    found = {}
    with mock.patch.dict(BACKENDS, {backend: anyway}), ops.use_attention_backend(backend):
        for piece in pieces:
            with nullcontext() if piece == "encoder" else FakeTensorMode():  # timm reads values
                for name, launches in PIECES[piece](config, metadata, batch).items():
                    found[piece, batch, residual, name] = launches
    return found


def row_of(launches: Sequence[Launch], *key) -> dict:
    """Return the row of a pass, whose key has the values of KEY: launch sites, and MB by kind."""
    row = {**dict(zip(KEY, key)), "launches": len(launches)}
    if row["piece"] == "encoder":
        row["residual"] = ANY
    for kind in KINDS:
        nbytes = sum(one.nbytes for one in launches if one.kind == kind)
        row[kind] = round(nbytes / 1e6, 2)
    return row


def committed(piece: str, batch: int, residual: str = "fp32") -> list[dict]:
    """Return the committed rows of a piece's passes; ValueError where there are none."""
    wanted = {"piece": piece, "batch": batch, "residual": ANY if piece == "encoder" else residual}
    rows = [row for row in read(FILE) if wanted.items() <= row.items()]
    if not rows:
        raise ValueError(f"{FILE.name} has no counts of {' '.join(map(str, wanted.values()))}")
    return rows


def moved(piece: str, batch: int, residual: str = "fp32", kinds=HELD, passes=PASSES) -> float:
    """Return the bytes of some kinds that are committed for some passes of a piece."""
    rows = [row for row in committed(piece, batch, residual) if row["pass"] in passes]
    return 1e6 * sum(row[kind] for row in rows for kind in kinds)


def misses(row: dict, before: dict) -> list[str]:
    """Return a line for each count that has grown, or shrunk so far that `before` is stale."""
    found = []
    for name in ("launches", *HELD):
        new, old = row[name], before[name]
        most, slack = (old, 0) if name == "launches" else (MORE * old + SMALL, SMALL)
        if not LESS * old - slack <= new <= most:
            place = " ".join(str(row[key]) for key in KEY)
            found.append(f"{place}: {name} {new}, expected {old}; to commit it: --write")
    return found


def table(rows: Sequence[dict]) -> list[str]:
    """Return rows for people, and the sum of both passes of each piece."""
    lines = []
    for row in rows:
        lines.append(row)
        if row["pass"] == "backward":  # after the same piece's forward
            both = {name: lines[-2][name] + row[name] for name in ("launches", *KINDS)}
            lines.append(row | both | {"pass": "both"})
    heads = (*KEY, "launch sites", "MB of the first three", *KINDS)
    return grid(
        heads,
        (
            (*(row[key] for key in KEY), row["launches"], f"{sum(row[k] for k in HELD):,.1f}")
            + tuple(f"{row[kind]:,.1f}" for kind in KINDS)
            for row in lines
        ),
    )


def write() -> None:
    """Replace the committed rows."""
    rows = []
    for batch, residual in COMMITTED:
        pieces = [name for name in PIECES if residual == "fp32" or name != "encoder"]
        for key, launches in count(PRESET, batch, residual, pieces).items():
            of_cards = {c: round(matmuls.milliseconds(launches, c), 3) for c in matmuls.CARDS}
            stamp = {"preset": PRESET, "backend": BACKEND, "torch": torch.__version__}
            rows.append(row_of(launches, *key) | {"matmul_ms": of_cards} | stamp)
    FILE.unlink(missing_ok=True)
    append(FILE, *rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Count and print, on the pretended card; 1 where a count is not as committed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default=PRESET, choices=presets.PRESETS)
    parser.add_argument("--batch", type=at_least(1), default=32, help="images of a forward pass")
    parser.add_argument("--residual-dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--backend", default=BACKEND, choices=ops.ATTENTION_BACKENDS)
    parser.add_argument("--pieces", nargs="+", default=PIECES, choices=PIECES)
    parser.add_argument("--list", action="store_true", help="show every launch site")
    parser.add_argument("--check", action="store_true", help="compare with the committed counts")
    parser.add_argument("--write", action="store_true", help="replace the committed counts")
    argv = sys.argv[1:] if argv is None else argv
    given = parser.parse_args(argv)
    held = {(PRESET, BACKEND, *case) for case in COMMITTED}
    if given.check and (given.preset, given.backend, given.batch, given.residual_dtype) not in held:
        parser.error(f"--check: only {PRESET} on {BACKEND} is committed, as {COMMITTED}")
    if not build.is_here():
        program = ("-m", "benchmarks.gpu.pretended", "-m", "benchmarks.step.traffic", *argv)
        os.execv(sys.executable, [sys.executable, *program])
    if given.write:
        write()
        return 0
    rows, wrong = [], []
    arguments = (given.preset, given.batch, given.residual_dtype, given.pieces, given.backend)
    for key, launches in count(*arguments).items():
        rows.append(row_of(launches, *key))
        if given.list:
            lines = [(one.kind, f"{one.nbytes / 1e6:.2f}", one.name) for one in launches]
            print("\n".join(grid((" ".join(map(str, key)), "MB", "launch site"), lines)))
        if given.check:
            before = {row["pass"]: row for row in committed(*key[:-1])}
            wrong += misses(rows[-1], before[key[-1]])
    print("\n".join([*table(rows), *wrong]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
