"""Launch sites of a training step and the bytes they move, on an H100 that is not there.

`python -m benchmarks.step.traffic` counts a block of the model (forward and backward), what runs
outside of the blocks, and the encoder, and prints them; `--write` commits the counts, which a test
then holds. `--list` shows every launch site.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.gpu.pretended import build
from benchmarks.harness.environment import RESULTS
from benchmarks.harness.rows import grid
from benchmarks.step.launches import KINDS, Eager, Launch, compiled, totals
from repa_fast import encoders, ops
from repa_fast.backend import dispatch
from repa_fast.configs import presets
from repa_fast.configs.build import build_model, expected_metadata, fit_to_data
from repa_fast.configs.config import TrainConfig
from repa_fast.data.dataset import Metadata
from repa_fast.distributed import World
from repa_fast.models.sit import SiT
from repa_fast.objective import build_alignment, build_objective
from repa_fast.train.compute_copy import add_copies
from repa_fast.train.step import losses, synthetic_batch

PRESET, BACKEND = "sit-xl2-repa", "sdpa-cudnn"
FILE = RESULTS / "offline" / "traffic.json"
Counted = dict[str, list[Launch]]  # by pass


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
    add_copies(model)
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


def count(preset: str, batch: int, residual: str, backend: str, pieces: Sequence[str]) -> dict:
    """Return {piece: launches by pass}, on the pretended card."""
    config, residual = presets.get(preset), {"fp32": "fp32", "bf16": "bf16"}[residual]
    metadata = expected_metadata(config)
    config = fit_to_data(config, metadata)
    config.residual_dtype = residual
    torch.backends.cuda.enable_cudnn_sdp(True)  # which pretending switches off, as it cannot run
    ops.set_attention_backend(backend)
    dispatch.use_kernels("triton")
    found = {}
    for name in pieces:
        with nullcontext() if name == "encoder" else FakeTensorMode():  # timm reads values
            found[name] = PIECES[name](config, metadata, batch)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Count and print, on the pretended card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default=PRESET, choices=presets.PRESETS)
    parser.add_argument("--batch", type=int, default=32, help="images of a forward pass")
    parser.add_argument("--residual-dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--backend", default=BACKEND, choices=ops.ATTENTION_BACKENDS)
    parser.add_argument("--pieces", nargs="+", default=PIECES, choices=PIECES)
    parser.add_argument("--list", action="store_true", help="every launch site")
    given = parser.parse_args(argv)
    if not build.is_here():
        program = [sys.executable, "-m", "benchmarks.gpu.pretended", "-m", "benchmarks.step.traffic"]
        sys.stdout.flush()
        os.execv(sys.executable, [*program, *(sys.argv[1:] if argv is None else argv)])
    found = count(given.preset, given.batch, given.residual_dtype, given.backend, given.pieces)
    for piece, passes in found.items():
        for name, launches in passes.items():
            print(piece, name, totals(launches))
            if given.list:
                for one in launches:
                    print(f"  {one.kind:12s} {one.nbytes / 1e6:9.2f} {one.name} {one.matmul or ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
