"""What SRA adds to a training step: `python -m benchmarks.step.sra`.

Three steps take turns: vanilla; SRA with the teacher stopped after its block, in the precision of
training; and SRA with the teacher as the released code runs it, all blocks and the final layer, in
fp32 and not compiled. On a CPU all three are fp32, and the last two differ by the depth of the
teacher alone. Writes a row and a report.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.harness.environment import parser, results_folder, stamp
from benchmarks.harness.rows import WITH_COMMAND, append, facts, grid, read
from benchmarks.harness.timing import Marks, spread, synchronise
from repa_fast import ops
from repa_fast.configs import presets
from repa_fast.configs.build import expected_metadata, fit_to_data
from repa_fast.configs.config import TrainConfig
from repa_fast.data.loader import Batch
from repa_fast.diffusion.draws import Draws
from repa_fast.distributed import World
from repa_fast.models.flops import transformer_flops
from repa_fast.models.sit import SIZES, SiT
from repa_fast.objective import Objective
from repa_fast.objective.self_alignment import SelfAlignment
from repa_fast.train import step
from repa_fast.train.memory import budget
from repa_fast.train.state import build_state

VARIANTS = ("vanilla", "SRA", "SRA, whole fp32 teacher")
PAPER_DEPTH = 28


def whole_teacher(
    alignment: SelfAlignment,
    batch: Batch,
    clean: torch.Tensor,
    draws: Draws,
    objective: Objective,
    teacher: SiT,
) -> list[torch.Tensor]:
    """Read the teacher's hidden state from a pass through all of the model in fp32.

    Attention is torch's own: the run's backend was chosen for another dtype.
    """
    heard = []

    def keep(_module, _inputs, outputs) -> None:
        x, branch, gate = outputs
        heard.append(x + gate[:, None] * branch)

    t = objective.earlier(draws.t, draws.offset, alignment.config.t_max)
    noisy, _ = objective.path.interpolate(clean, draws.noise, t)
    block = teacher.blocks[alignment.teacher_depth - 1]
    handle = block.register_forward_hook(keep)
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            torch.autocast(clean.device.type, enabled=False),
            ops.use_attention_backend("sdpa"),
        ):
            teacher(noisy, t, batch["label"], draws.drop)
    finally:
        handle.remove()
    return heard


@contextmanager
def targets_of(variant: str) -> Iterator[None]:
    """Train with the variant's teacher."""
    ours = SelfAlignment.targets
    if variant == VARIANTS[2]:
        SelfAlignment.targets = whole_teacher
    try:
        yield
    finally:
        SelfAlignment.targets = ours


def configs(arguments: argparse.Namespace) -> dict[str, TrainConfig]:
    """Return vanilla, and SRA at the asked size with its blocks at SiT-XL's shares of the depth."""
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


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Return the milliseconds of every measured step; the variants take turns."""
    device = torch.device(arguments.device)
    states, times = {}, {name: [] for name in VARIANTS}
    for name, config in configs(arguments).items():
        states[name] = build_state(config, expected_metadata(config), World(0, 1, device))
        states[name].micro_batch = states[name].local_batch
    batches = {name: step.synthetic_batch(s, s.local_batch)[0] for name, s in states.items()}
    for number in range(arguments.warmup + arguments.steps):
        for name, state in states.items():
            marks = Marks(device)
            synchronise(device)
            marks.mark()
            with targets_of(name):
                step.train_step(state, batches[name])
            marks.mark()
            if number >= arguments.warmup:
                times[name] += marks.milliseconds()
    return times


def flops(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the training FLOPs per image of each variant."""
    counted = {}
    for name, config in configs(arguments).items():
        metadata = expected_metadata(config)
        config = fit_to_data(config, metadata)
        estimate = budget(config, metadata)
        counted[name] = estimate.train_flops
        if name == VARIANTS[2]:
            size = SIZES[config.model.removeprefix("SiT-").split("/")[0]]
            tokens = (config.resolution // 16) ** 2
            whole = transformer_flops(tokens=tokens, width=size["hidden_size"], depth=size["depth"])
            counted[name] += whole - estimate.encoder_flops
    return counted


def report(row: dict) -> str:
    """Return Markdown of one row."""
    base, body = row["variants"][VARIANTS[0]], []
    for name, figures in row["variants"].items():
        work, times = figures["gflop_per_image"], [figures[f"ms_p{p}"] for p in (20, 50, 80)]
        ratios = work / base["gflop_per_image"], figures["ms_p50"] / base["ms_p50"]
        cells = (f"{work:.1f}", f"{ratios[0]:.3f}", *(f"{ms:.1f}" for ms in times))
        body.append((name, *cells, f"{ratios[1]:.3f}"))
    names = (*WITH_COMMAND, "model", "batch", "steps")
    lines = ["# What SRA adds to a training step", "", *facts([row], names), ""]
    heads = ("step", "GFLOP per image", "to vanilla", "ms p20", "p50", "p80", "to vanilla (p50)")
    return "\n".join([*lines, *grid(heads, body)])


def main() -> None:
    """Measure one model."""
    flags = parser(__doc__)
    flags.add_argument("--model", default="SiT-XL/2", help="SiT-{S,B,L,XL}/2")
    flags.add_argument("--batch", type=int, default=32, help="images per step")
    flags.add_argument("--steps", type=int, default=50)
    flags.add_argument("--warmup", type=int, default=5)
    flags.add_argument("--compile", action="store_true")
    arguments = flags.parse_args()
    work = flops(arguments)
    figures = {
        name: {"gflop_per_image": work[name] / 1e9, **spread("ms", times)}
        for name, times in measure(arguments).items()
    }
    options = {key: getattr(arguments, key) for key in ("model", "batch", "steps", "compile")}
    row = {**options, "variants": figures, **stamp()}
    print(report(row))
    folder = arguments.out or results_folder("sra", arguments.device)
    append(folder / "rows.jsonl", row)
    rewrite(folder)


def rewrite(folder: Path) -> None:
    """Write report.md of the last row in `folder`."""
    (folder / "report.md").write_text(report(read(folder / "rows.jsonl")[-1]))


if __name__ == "__main__":
    main()
