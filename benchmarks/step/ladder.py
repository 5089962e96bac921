"""The training step, one change at a time: `python -m benchmarks.step.ladder`.

    recipe         the paper's recipe in plain PyTorch (benchmarks/step/baseline.py): fp16, eager,
                   foreach AdamW
    tuned          + bf16, loss of whole batches, fused AdamW, foreach EMA, no host reads
    compiled       + torch.compile of each block and of the encoder
    kernels        + our kernels and bf16 leaves (repa_fast/train/leaves.py): the project's own
                   step, with torch's optimizer, which casts gradients and writes leaves apart
    one-pass       + csrc's optimizer: gradients, weights, first EMA and leaves in one pass
    graph          + the step as one CUDA graph; on a GPU only. What a run on one GPU does
    bf16-residual  graph with the residual stream in bf16
    features       graph with features from the dataset instead of the encoder
    released       the released code's own model and loss, from `--official FOLDER`: what the recipe
                   stands for

Configurations run one after another in one process, each with its own warm-up, on the same weights
and batch; one whose loss differs from that of plain fp32 gets no figure (that of `features` is not
compared: its features are made up). Rows are appended as they come, so that several commands can
share one report. On a CPU the recipe computes in fp32, and bf16 may be slower than that.
"""

import argparse
import gc
import itertools
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.environment import at_least, results_folder, stamp
from benchmarks.step import report as step_report
from benchmarks.step import step
from benchmarks.step.baseline import Baseline, Official
from benchmarks.step.step import Feed, Ours
from repa_fast import encoders, ops
from repa_fast.backend import dispatch
from repa_fast.configs import presets
from repa_fast.configs.build import expected_metadata, fit_to_data
from repa_fast.data.features import FeatureColumn
from repa_fast.data.loader import Batch
from repa_fast.diffusion.draws import Draws
from repa_fast.kernels.attention.backends import describe
from repa_fast.testing import randomise
from repa_fast.train.state import TrainState
from repa_fast.train.step import synthetic_batch

LOSS_TOLERANCE = 0.01
"""Relative. A mean of thousands of terms with the 2^-8 of bf16 each; a wrong time, sign, weight or
missing term moves it by more."""


@dataclass(frozen=True)
class Rung:
    """A configuration of the ladder."""

    what: str  # it changes
    base: str = ""  # the configuration that it changes
    plain: str = ""  # the rival's "recipe" as released or "tuned", or the "official" release
    compiled: bool = True  # by torch.compile
    cached: bool = False  # features come with the batch
    cuda: bool = False  # it does not exist on a CPU
    config: Mapping[str, Any] = field(default_factory=dict)  # of the run


STOCK = {"optimizer_impl": "torch", "cuda_graph": "off"}
ONE_PASS = {"optimizer_impl": "cuda", "cuda_graph": "off"}
GRAPH = {"optimizer_impl": "cuda", "cuda_graph": "on"}
RESIDUAL = GRAPH | {"residual_dtype": "bf16"}
"""What a CPU lacks is replaced there; on a GPU a configuration has what it names, or fails."""
MOST_IMAGES = 128
"""Of one forward pass, unless --micro-batch says otherwise: 256 need more than 80 GB."""
RUNGS = {
    "recipe": Rung("the paper's recipe", plain="recipe", compiled=False),
    "tuned": Rung(
        "+ bf16, one loss, fused AdamW, no host reads", "recipe", "tuned", compiled=False
    ),
    "compiled": Rung("+ torch.compile", "tuned", "tuned"),
    "kernels": Rung("+ our kernels, bf16 leaves", "compiled", config=STOCK),
    "one-pass": Rung("+ optimizer in one pass", "kernels", config=ONE_PASS),
    "graph": Rung("+ one CUDA graph", "one-pass", config=GRAPH, cuda=True),
    "bf16-residual": Rung("graph + bf16 residual stream", "graph", config=RESIDUAL),
    "features": Rung("graph + cached features", "graph", config=GRAPH, cached=True),
    "released": Rung("the released code", "recipe", "official", compiled=False),
}


def feature_columns(preset: str) -> dict[str, FeatureColumn]:
    """Return a column for each of the preset's encoders, by name."""
    config, columns = presets.get(preset), {}
    config = fit_to_data(config, expected_metadata(config))
    kind = {"resolution": config.resolution, "storage": "fp16", "precision": "bf16"}
    for number, spec in enumerate(encoders.specs(config.enc_type)):
        shape = {"tokens": spec.num_tokens(config.resolution), "width": spec.width}
        name = f"features{number}"
        columns[name] = FeatureColumn(name=name, encoder=spec.name, **kind, **shape)
    return columns


def settings(rung: Rung, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a configuration changes of the preset's config."""
    released = "no" if arguments.device == "cpu" else "fp16"
    own = arguments.precision
    changes = {
        "compile": rung.compiled and not arguments.eager,
        "mixed_precision": released if rung.plain in ("recipe", "official") else own,
        "attention": "sdpa" if rung.plain else "auto",
        "kernels": "auto" if rung.plain or arguments.device == "cpu" else "triton",
        **rung.config,
    }
    return changes | STOCK if arguments.device == "cpu" else changes


def prepare(rung: Rung, arguments: argparse.Namespace, folder: Path) -> TrainState:
    """Return a configuration's state: the same weights for all, none of them zero."""
    changes = settings(rung, arguments)
    if rung.cached:
        columns = feature_columns(arguments.preset)
        changes |= {"columns": columns, "features": ",".join(columns)}
    torch.manual_seed(0)
    state = step.build(arguments, folder, **changes)
    randomise(state.model)
    state.ema.load_state_dict(state.model.state_dict())
    return state


def expected_loss(state: TrainState, size: int) -> float:
    """Return the plain fp32 loss of a state's weights on `size` images."""
    batch, draws = probe(state, size)
    plain = Baseline(state, tuned=False, compiled=False)
    plain.precision = None
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return plain.loss_of(batch, draws)


def probe(state: TrainState, size: int) -> tuple[Batch, Draws]:
    """Return a batch of `size` images and its draws, the same for all."""
    torch.manual_seed(2)
    return synthetic_batch(state, size)


def measure(rung: Rung, arguments: argparse.Namespace) -> dict:
    """Return a configuration's figures; raise RuntimeError if its loss is not plain fp32's."""
    with tempfile.TemporaryDirectory() as folder:
        state = prepare(rung, arguments, Path(folder))
        size = state.local_batch if rung.plain else state.micro_batch
        batch, draws = probe(state, size)
        expected = None if rung.cached else expected_loss(state, size)
        if rung.plain == "official":
            stepper = Official(state, arguments.official)
        elif rung.plain:
            stepper = Baseline(state, tuned=rung.plain == "tuned", compiled=state.config.compile)
        else:
            stepper = Ours(state)
        before = time.perf_counter()
        loss = stepper.loss_of(batch, draws)
        if expected and abs(loss / expected - 1) > LOSS_TOLERANCE:
            raise RuntimeError(f"loss {loss:.4f} where plain fp32 has {expected:.4f}")
        notes = [] if rung.plain else state.notes
        feed = Feed(step.repeated(probe(state, state.local_batch)[0]))
        del state, batch, draws
        free()  # what the rival does not need of the state
        step.first_step(stepper, feed)
        start = {"first_step_seconds": time.perf_counter() - before}
        found = step.figures(stepper, feed, arguments, Path(folder) / "trace.json")
    return {**step.settings(stepper, arguments), **start, **found, "loss": loss, "notes": notes}


def free() -> None:
    """Give back the memory of what is not referred to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def climb(arguments: argparse.Namespace, folder: Path) -> list[dict]:
    """Return a row for each configuration that was asked for, of the middle one of its rounds."""
    end = time.monotonic() + arguments.limit
    rows, rounds = [], defaultdict(list)
    for number, name in itertools.product(range(arguments.rounds), arguments.rung):
        rung, before = RUNGS[name], time.monotonic()
        if before > end:
            print(f"time limit: {name} left out", flush=True)
            continue
        if rung.cuda and arguments.device == "cpu":
            continue
        if rung.plain == "official" and not arguments.official:
            print(f"{name} left out: --official names no folder", flush=True)
            continue
        skipped = " (not compiled)" if rung.compiled and arguments.eager else ""
        row = {"rung": name, "bases": bases(rung), "what": rung.what + skipped, **stamp()}
        try:
            row |= {"status": "ok", **measure(rung, arguments)}
        except Exception as error:  # compilers raise anything; the next one may run
            row |= {"preset": arguments.preset, "batch": arguments.batch}
            row |= {"status": "failed", "message": describe(error)}
        row["seconds"] = time.monotonic() - before
        print(line(row), flush=True)
        rounds[name].append(row)
        if number == arguments.rounds - 1:
            rows.append(middle(rounds[name]))
            step.append(folder, rows[-1])
        torch.compiler.reset()
        free()
    for measured in rounds.values():
        if len(measured) < arguments.rounds:  # the limit came between
            rows.append(middle(measured))
            step.append(folder, rows[-1])
    dispatch.use_kernels(None)
    ops.set_attention_backend("sdpa")
    return rows


def middle(rounds: list[dict]) -> dict:
    """Return the row with the median time, and the times of all; a failed one if none has any."""
    ok = sorted((row for row in rounds if row["status"] == "ok"), key=lambda row: row["ms_p50"])
    if len(rounds) == 1 or not ok:
        return rounds[-1]
    return ok[len(ok) // 2] | {"ms_of_rounds": [row.get("ms_p50") for row in rounds]}


def bases(rung: Rung) -> list[str]:
    """Return what a configuration changes, what that changes, and so on."""
    found = []
    while rung.base:
        found.append(rung.base)
        rung = RUNGS[rung.base]
    return found


def line(row: dict) -> str:
    """Return a row as it passes."""
    if row["status"] != "ok":
        return f"{row['rung']}: no figure, {row['message']}"
    rate = f"{row['images_per_second']:,.1f} images/s"
    return f"{row['rung']}: {row['ms_p50']:.2f} ms, {rate}, after {row['seconds']:.0f} s"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the configurations; return 1 if one has no figure."""
    flags = step.parser(__doc__.splitlines()[0], "sit-xl2-repa")
    flags.add_argument("--rung", nargs="+", choices=RUNGS, default=list(RUNGS))
    flags.add_argument("--eager", action="store_true", help="compile nothing, for a quick look")
    text = "images of a forward pass of ours; 128 at most by default"
    flags.add_argument("--micro-batch", type=at_least(0), default=0, help=text)
    text = "of all but the recipe and the released code"
    flags.add_argument("--precision", default="bf16", choices=("bf16", "no"), help=text)
    text = "measure all so many times in turn; the middle one counts"
    flags.add_argument("--rounds", type=at_least(1), default=1, help=text)
    text = "folder of the released code; else that of REPA_OFFICIAL"
    released = os.environ.get("REPA_OFFICIAL")  # argparse makes a Path of it
    flags.add_argument("--official", type=Path, default=released, help=text)
    flags.add_argument("--limit", type=float, default=1e9, help="seconds; begins nothing later")
    flags.set_defaults(data="")
    arguments = flags.parse_args(argv)
    arguments.micro_batch = arguments.micro_batch or min(arguments.batch, MOST_IMAGES)
    folder = arguments.out or results_folder("ladder", arguments.device)
    rows = climb(arguments, folder)
    if not rows:
        return 0
    print(step_report.markdown(step_report.read(folder / "rows.jsonl")))
    print(folder)
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
