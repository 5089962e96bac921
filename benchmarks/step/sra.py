"""What SRA adds to a training step: `python -m benchmarks.step.sra`.

Three steps take turns: vanilla; SRA with the teacher stopped after its block, in the precision of
training; and SRA with the teacher as the released code runs it, all blocks and the final layer, in
fp32 and not compiled. On a CPU all three are fp32, and the last two differ by the depth of the
teacher alone. Writes a row and a report.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.harness.environment import results_folder, stamp
from repa_fast import ops
from repa_fast.cli import expected_metadata
from repa_fast.configs import presets
from repa_fast.configs.config import TrainConfig
from repa_fast.data.loader import Batch
from repa_fast.diffusion.draws import Draws
from repa_fast.diffusion.sra import teacher_times
from repa_fast.distributed import World
from repa_fast.models.flops import transformer_flops
from repa_fast.models.sit import SIZES
from repa_fast.train import step
from repa_fast.train.memory import budget
from repa_fast.train.state import TrainState, build_state

VARIANTS = ("vanilla", "SRA", "SRA, whole fp32 teacher")
PAPER_DEPTH = 28


def whole_teacher(
    state: TrainState, batch: Batch, clean: torch.Tensor, draws: Draws
) -> list[torch.Tensor]:
    """The teacher's hidden state, read from a pass through all of the model in fp32.

    Attention is torch's own: the run's backend was chosen for another dtype.
    """
    heard = []

    def keep(_module, _inputs, outputs) -> None:
        x, branch, gate = outputs
        heard.append(x + gate[:, None] * branch)

    t = teacher_times(draws.t, draws.offset, state.config.t_max)
    noisy, _ = state.path.interpolate(clean, draws.noise, t)
    block = state.ema.blocks[state.config.block_out_t - 1]
    handle = block.register_forward_hook(keep)
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            torch.autocast(state.world.device.type, enabled=False),
            ops.use_attention_backend("sdpa"),
        ):
            state.ema(noisy, t, batch["label"], draws.drop)
    finally:
        handle.remove()
    return heard


@contextmanager
def targets_of(variant: str) -> Iterator[None]:
    """The training step with the variant's teacher."""
    ours = step.alignment_targets
    if variant == VARIANTS[2]:
        step.alignment_targets = whole_teacher
    try:
        yield
    finally:
        step.alignment_targets = ours


def configs(arguments: argparse.Namespace) -> dict[str, TrainConfig]:
    """Vanilla, and SRA at the asked size, its blocks at the same share of the depth as SiT-XL's."""
    depth = SIZES[arguments.model.removeprefix("SiT-").split("/")[0]]["depth"]
    sra = dataclasses.replace(
        presets.get("sit-xl2-sra-cos"),
        model=arguments.model,
        batch_size=arguments.batch,
        compile=arguments.compile,
        block_out_s=round(8 * depth / PAPER_DEPTH),
        block_out_t=round(20 * depth / PAPER_DEPTH),
        report_to="none",
    )
    vanilla = dataclasses.replace(sra, align="repa", enc_type="none")
    return dict(zip(VARIANTS, (vanilla, sra, sra), strict=True))


def build(config: TrainConfig, device: torch.device) -> TrainState:
    """A state ready to step."""
    state = build_state(config, expected_metadata(config), World(0, 1, device))
    state.micro_batch = state.local_batch
    return state


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of every measured step; the variants take turns."""
    device = torch.device(arguments.device)
    states = {name: build(c, device) for name, c in configs(arguments).items()}
    batches = {name: step.synthetic_batch(s, s.local_batch)[0] for name, s in states.items()}
    times: dict[str, list[float]] = {name: [] for name in states}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for number in range(arguments.warmup + arguments.steps):
        for name, state in states.items():
            before = now()
            with targets_of(name):
                step.train_step(state, batches[name])
            if number >= arguments.warmup:
                times[name].append(1e3 * (now() - before))
    return times


def flops(arguments: argparse.Namespace) -> dict[str, float]:
    """Training FLOPs per image of each variant."""
    counted = {}
    for name, config in configs(arguments).items():
        estimate = budget(config, expected_metadata(config))
        counted[name] = estimate.train_flops
        if name == VARIANTS[2]:
            size = SIZES[config.model.removeprefix("SiT-").split("/")[0]]
            tokens = (config.resolution // 16) ** 2
            whole = transformer_flops(tokens=tokens, width=size["hidden_size"], depth=size["depth"])
            counted[name] += whole - estimate.encoder_flops
    return counted


def report(row: dict) -> str:
    """Markdown of one row."""
    lines = ["# What SRA adds to a training step", ""]
    lines += [f"- {name}: {row[name]}" for name in (*stamp(), "model", "batch", "steps")]
    lines += [
        "",
        "| step | GFLOP per image | to vanilla | ms p20 | p50 | p80 | to vanilla (p50) |",
        "|---|---|---|---|---|---|---|",
    ]
    base = row["variants"][VARIANTS[0]]
    for name, figures in row["variants"].items():
        work = figures["gflop_per_image"]
        lines.append(
            f"| {name} | {work:.1f} | {work / base['gflop_per_image']:.3f} | "
            f"{figures['ms_p20']:.1f} | {figures['ms_p50']:.1f} | {figures['ms_p80']:.1f} | "
            f"{figures['ms_p50'] / base['ms_p50']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="SiT-XL/2", help="SiT-{S,B,L,XL}/2")
    parser.add_argument("--batch", type=int, default=32, help="images per step")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    work = flops(arguments)
    figures = {}
    for name, times in measure(arguments).items():
        cuts = statistics.quantiles(times, n=10, method="inclusive")
        figures[name] = {
            "gflop_per_image": work[name] / 1e9,
            "ms_p20": cuts[1],
            "ms_p50": statistics.median(times),
            "ms_p80": cuts[7],
        }
    options = {key: getattr(arguments, key) for key in ("model", "batch", "steps", "compile")}
    row = {**options, "variants": figures, **stamp()}
    print(report(row))
    out = results_folder("sra", arguments.device)
    with open(out / "rows.jsonl", "a") as rows:
        rows.write(json.dumps(row) + "\n")
    rewrite(out)


def rewrite(folder: Path) -> None:
    """Write report.md of the last row in `folder`."""
    row = json.loads((folder / "rows.jsonl").read_text().splitlines()[-1])
    (folder / "report.md").write_text(report(row))


if __name__ == "__main__":
    main()
