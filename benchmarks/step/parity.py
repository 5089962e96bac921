"""What speed costs in exactness: `python -m benchmarks.step.parity --preset sit-s2-repa`.

A configuration of the ladder, and plain eager bf16, against plain eager fp32, on the same weights
(adaLN and final layer ~ N(0, 0.02), where most gradients would be zero), batches and draws:

- the gradient of every parameter, by its cosine and its norm;
- the losses of some hundred steps.

With --eager on a CPU bf16 matmuls are fp32 ones of the same values, rounded once, as on a GPU: many
CPUs have no instructions for them, and take seventy times as long.

Rows, a report and a picture go to a folder; the exit status is 1 if one does not hold what
GRADIENT_COSINE, NORM_RATIO and LOSS_RATIO ask for.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness.environment import at_least, results_folder, stamp
from benchmarks.harness.rows import WITH_COMMAND, append, facts, grid
from benchmarks.step import ladder
from benchmarks.step.ladder import RUNGS, Rung
from benchmarks.step.step import parser
from repa_fast import ops
from repa_fast.backend import dispatch
from repa_fast.data.loader import Batch
from repa_fast.distributed import progress_bar
from repa_fast.train.graph import stepper
from repa_fast.train.state import TrainState
from repa_fast.train.step import accumulate, draw_local, synthetic_batch

GRADIENT_COSINE = 0.999
NORM_RATIO = 0.01
LOSS_RATIO = 2.0
"""The least cosine of a gradient with fp32's; how far the ratio of norms may be from 1; how many
times as far from fp32's as plain bf16's the losses may be."""

PLAIN = {"kernels": "reference", "attention": "sdpa", "optimizer_impl": "torch"}
EXACT = Rung("plain fp32", compiled=False, config=PLAIN | {"mixed_precision": "no"})
USUAL = Rung("plain bf16", compiled=False, config=EXACT.config)
OURS = [name for name, rung in RUNGS.items() if not rung.plain and not rung.cached]
MATMULS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
BATCHES = 8  # that the steps take in turn: few enough for the loss to fall


class WideMatmuls(TorchDispatchMode):
    """Computes matmuls of bf16 tensors in fp32, and rounds what comes out."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in MATMULS and args[-1].dtype == torch.bfloat16:
            return function(*(tensor.float() for tensor in args), **kwargs or {}).bfloat16()
        return function(*args, **kwargs or {})


def gradients(state: TrainState, batch: Batch) -> dict[str, torch.Tensor]:
    """Return every parameter's gradient at the first step, on the host in fp64."""
    accumulate(state, batch, draw_local(state))
    weights = state.model.state_dict(keep_vars=True)
    found = {name: state.optimizer.gradient(weight) for name, weight in weights.items()}
    found = {name: g.double().cpu() for name, g in found.items() if g is not None}
    state.optimizer.zero_grad(set_to_none=True)
    return found


def losses(state: TrainState, given: list[Batch], steps: int) -> list[float]:
    """Return the loss of each step, read after the last one: the host is ahead as in a run."""
    take_step, sums = stepper(state), [state.metrics.sums.clone()]
    with progress_bar("images whose losses are compared", shown=True) as progress:
        advance = progress(steps * state.local_batch)
        for step in range(steps):
            take_step(given[step % len(given)])
            sums.append(state.metrics.sums.clone())
            advance((step + 1) * state.local_batch)
    if skipped := state.metrics.read(state.world)["skipped"]:
        raise RuntimeError(f"{skipped} steps were skipped; no figure")
    return torch.stack(sums)[:, 0].diff().tolist()


def compare(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict:
    """Find the least cosine of a gradient with the exact one, and the norm furthest off."""
    if found.keys() != exact.keys():
        raise RuntimeError(f"gradients of {found.keys() ^ exact.keys()} in one of two runs only")
    if spoilt := [name for name, gradient in found.items() if not gradient.isfinite().all()]:
        raise RuntimeError(f"gradients that are not finite: {', '.join(spoilt)}")
    cosines, ratios = {}, {}
    for name, expected in exact.items():
        norms = found[name].norm(), expected.norm()
        cosines[name] = ((found[name] * expected).sum() / (norms[0] * norms[1])).item()
        ratios[name] = (norms[0] / norms[1]).item()
    least = min(cosines, key=cosines.get)
    furthest = max(ratios, key=lambda name: abs(ratios[name] - 1))
    row = {"gradients": len(exact), "least_cosine": cosines[least], "least_cosine_of": least}
    return row | {"norm_ratio": ratios[furthest], "norm_ratio_of": furthest}


def distance(found: list[float], exact: list[float]) -> float | None:
    """Return the mean difference of the losses over the mean size of the exact ones."""
    if not exact:
        return None
    size = sum(map(abs, exact))
    return sum(abs(one - other) for one, other in zip(found, exact)) / size


def measure(rung: Rung, arguments: argparse.Namespace) -> tuple[dict, list[float], list[str]]:
    """Return gradients and losses of a configuration, and notes about how it computes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.compiler.reset()
        ladder.free()  # what the configuration before left
        state = ladder.prepare(rung, arguments, Path(folder))
        if rung is USUAL:  # fp32 weights, cast by autocast in every pass
            state.autocast_dtype = torch.bfloat16
        torch.manual_seed(3)  # the same batches for all
        given = [synthetic_batch(state, state.local_batch)[0] for _ in range(BATCHES)]
        on_cpu = arguments.eager and arguments.device == "cpu"
        with WideMatmuls() if on_cpu else nullcontext():
            first = gradients(state, given[0])
            return first, losses(state, given, arguments.train), state.notes


def parity(arguments: argparse.Namespace) -> Iterator[dict]:
    """Return a row for plain bf16 and one for each configuration that was asked for."""
    exact, exact_losses, _ = measure(EXACT, arguments)
    for name, rung in [("bf16", USUAL), *((name, RUNGS[name]) for name in arguments.rung)]:
        if rung.cuda and arguments.device == "cpu":
            continue
        found, found_losses, notes = measure(rung, arguments)
        row = {"rung": name, "what": rung.what, "preset": arguments.preset}
        row |= {"batch": arguments.batch, "steps": arguments.train, **compare(found, exact)}
        row |= {"loss_distance": distance(found_losses, exact_losses), "notes": notes}
        row |= {"losses": found_losses, "exact_losses": exact_losses, **stamp()}
        print(line(row), flush=True)
        yield row
    dispatch.use_kernels(None)
    ops.set_attention_backend("sdpa")


def line(row: dict) -> str:
    """Return a row as it passes."""
    losses = row["loss_distance"]
    apart = "" if losses is None else f", losses {losses:.2e} from fp32"
    figures = f"least cosine {row['least_cosine']:.6f}, norm ratio {row['norm_ratio']:.4f}"
    return f"{row['rung']}: {figures}{apart}"


def misses(row: dict, usual: dict) -> list[str]:
    """Return what a configuration does not hold, beside the row of plain bf16."""
    missed = []
    if not row["least_cosine"] >= GRADIENT_COSINE:
        missed.append(f"cosine of {row['least_cosine_of']} below {GRADIENT_COSINE}")
    if not abs(row["norm_ratio"] - 1) <= NORM_RATIO:
        missed.append(f"norm of {row['norm_ratio_of']} off by more than {NORM_RATIO:.0%}")
    if row["steps"] and not row["loss_distance"] <= LOSS_RATIO * usual["loss_distance"]:
        missed.append(f"losses more than {LOSS_RATIO:g} times as far from fp32 as plain bf16's")
    return missed


def markdown(rows: list[dict]) -> str:
    """Return the report of the rows of one command."""
    first, body = rows[0], []
    for row in rows:
        loss = "" if row["loss_distance"] is None else f"{row['loss_distance']:.2e}"
        cosine = f"{row['least_cosine']:.6f}", row["least_cosine_of"]
        norm = f"{row['norm_ratio']:.4f}", row["norm_ratio_of"]
        holds = "; ".join(misses(row, first)) or "yes"
        body.append((row["rung"], row["what"], *cosine, *norm, loss, holds))
    heads = ("configuration", "what it is", "least cosine", "of", "norm ratio furthest from 1")
    lines = [
        f"# Parity: {first['preset']}, batch {first['batch']}",
        "",
        *facts(rows[:1], WITH_COMMAND),
        "",
        f"Against plain eager fp32: {first['gradients']} gradients of the first step, and the "
        f"losses of {first['steps']} steps (mean difference over mean size).",
        "",
        *grid((*heads, "of", "losses", "holds"), body)[:-1],
    ]
    lines += [f"- {row['rung']}: {'; '.join(row['notes'])}" for row in rows if row["notes"]]
    return "\n".join([*lines, "", *(["![losses](losses.png)", ""] if first["steps"] else [])])


def draw(rows: list[dict], path: Path) -> None:
    """Draw the loss of fp32, and how far the others are from it, by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    whole, apart = figure.subplots(1, 2)
    exact = rows[0]["exact_losses"]
    whole.plot(exact, color="#333333", linewidth=1)
    whole.set(title="loss in plain fp32", xlabel="step")
    for row in rows:
        differences = [abs(a - b) for a, b in zip(row["losses"], exact)]
        apart.plot(differences, linewidth=0.8, label=row["rung"])
    apart.set(title="difference from it", xlabel="step", yscale="log")
    apart.legend(frameon=False, fontsize=8)
    for axis in (whole, apart):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Compare; return 1 if a configuration does not hold what is asked of it."""
    flags = parser(__doc__.splitlines()[0], "sit-s2-repa")
    text = "configurations of the ladder"
    flags.add_argument("--rung", nargs="+", choices=OURS, default=["one-pass"], help=text)
    text = "steps whose losses are compared"
    flags.add_argument("--train", type=at_least(0), default=300, help=text)
    flags.add_argument("--eager", action="store_true", help="compile nothing")
    text = "images of a forward pass; the whole batch by default"
    flags.add_argument("--micro-batch", type=at_least(0), default=0, help=text)
    flags.set_defaults(precision="bf16")
    arguments = flags.parse_args(argv)
    folder = arguments.out or results_folder("parity", arguments.device)
    rows = []
    for row in parity(arguments):
        rows.append(row)
        append(folder / "rows.jsonl", row)
        if arguments.train:
            draw(rows, folder / "losses.png")
        (folder / "report.md").write_text(markdown(rows))
    print((folder / "report.md").read_text())
    return int(any(misses(row, rows[0]) for row in rows[1:]))


if __name__ == "__main__":
    sys.exit(main())
