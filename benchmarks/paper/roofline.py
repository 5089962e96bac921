"""The roofline of every op and of the training step: `python -m benchmarks.paper.roofline --write`.

What has to be computed and moved, the least time for that at the rates that the card itself reached
in the same sitting (a large copy, a large bf16 matmul), and what was measured, from committed rows
of GPUs alone; before there are any, at an H200's reported rates. The tables stand between marks in
docs/performance.md; `--check` fails where the page has others.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.harness.environment import RESULTS, ROOT
from benchmarks.harness.rows import filled, from_gpus, grid, is_current, read
from benchmarks.kernels.ops import CASES, Problem, short
from benchmarks.paper.scaling_model import Machine, Work, work
from benchmarks.step import traffic
from benchmarks.step.optim import BYTES, LEAF_BYTES
from repa_fast.configs import presets
from repa_fast.models.sit import size

PAGE = ROOT / "docs" / "performance.md"
PRESET, BATCHES = "sit-xl2-repa", (32, 256)
DEPTH, ENCODER_DEPTH = size(presets.get(PRESET).model)["depth"], 12
MICRO_BATCH = 128  # images of a forward pass, at most
H100 = Machine(matmul=798e12, memory=3.0e12)  # as reported
PARTS_RUNG, STEP_RUNGS = "one-pass", ("graph", "one-pass", "")
"""Of the ladder: the step whose kernels the profiler tells apart, and the step itself, one CUDA
graph where it was measured so."""

NOT_YET = "not yet"
CATEGORIES = {
    "matmuls": ("GEMM",),
    "attention": ("attention",),
    "elementwise": ("our kernels", "other elementwise"),
    "optimizer and EMA": ("optimizer",),
    "encoder": ("encoder",),
}
"""Parts of a step -> categories of benchmarks.step.profile."""


def latest(rows: Iterable[dict], **wanted) -> dict | None:
    """Return the last row with these values."""
    found = [row for row in rows if all(row.get(name) == wanted[name] for name in wanted)]
    return found[-1] if found else None


def floor(flops: float, nbytes: float, machine: Machine) -> float:
    """Return the milliseconds of an op whose arithmetic and traffic overlap."""
    return 1e3 * max(flops / machine.matmul, nbytes / machine.memory)


def compared(least: float, row: dict | None) -> tuple[str, str, str]:
    """Return measured milliseconds, their ratio to the floor, and where they come from."""
    if row is None:
        return NOT_YET, "", ""
    ratio = f"{row['ms_p50'] / least:.2f}" if least else ""
    return f"{row['ms_p50']:.4g}", ratio, f"{row['device']}, {row['commit']}"


def ops_table(machine: Machine, rows: Sequence[dict]) -> list[str]:
    """Return each op at its first shape and dtype, those of SiT-XL/2's step with 32 images."""
    lines = []

    def add(named: tuple[str, ...], flops: float, nbytes: float, row: dict | None) -> None:
        least = floor(flops, nbytes, machine)
        counted = f"{flops / 1e9:,.4g}" if flops else "", f"{nbytes / 1e6:,.1f}"
        lines.append((*named, *counted, f"{least:.4g}", *compared(least, row)))

    for op, case in CASES.items():
        problem = Problem(case, case.shapes[0], case.dtypes[0])
        shape, dtype = list(problem.shape), short(problem.dtype)
        for mode in (mode for mode in ("forward", "backward") if mode in case.modes):
            named = (op, "x".join(map(str, shape)), dtype, mode)
            row = best(rows, op=op, shape=shape, dtype=dtype, mode=mode)
            add(named, problem.flops(mode), problem.necessary_bytes(mode), row)
    parameters = work(presets.get(PRESET)).parameters
    row = latest((row for row in rows if "tensors" in row), provider="cuda")
    named = ("adamw_ema", f"{parameters:,}", "fp32", "step")
    add(named, 0, sum(BYTES.values()) * parameters, row)
    heads = ("op", "shape", "dtype", "pass", "GFLOP", "MB", "floor, ms", "measured, ms", "ratio")
    return grid((*heads, "of"), lines)


def best(rows: Sequence[dict], **wanted) -> dict | None:
    """Return our kernel's last row; for attention, which has none, the fastest backend's."""
    if wanted["op"] != "attention":
        return latest(rows, **wanted, provider="ours")
    providers = {row["provider"] for row in rows if row.get("op") == "attention"}
    found = [latest(rows, **wanted, provider=provider) for provider in providers]
    return min((row for row in found if row), key=lambda row: row["ms_p50"], default=None)


def step_parts(found: Work, batch: int) -> dict[str, tuple[float, float]]:
    """Return FLOPs and bytes of each part of a step with `batch` images."""
    attention = tuple(batch * each for each in found.attention)
    flops = batch * (found.forward.flops + found.backward.flops) - attention[0]
    return {
        "matmuls": (flops, 0.0),
        "attention": attention,
        "elementwise": (0.0, elementwise_bytes(batch)),
        "optimizer and EMA": (0.0, sum(LEAF_BYTES.values()) * found.parameters),
        "encoder": (batch * found.frozen.flops, batch * found.frozen.nbytes),
    }


def elementwise_bytes(batch: int, residual: str = "fp32") -> float:
    """Return the bytes of a step's blocks, all taken as those in the middle, and of the rest."""
    size = min(batch, MICRO_BATCH)
    of_block, outside = (traffic.moved(piece, size, residual) for piece in ("block", "outside"))
    return batch // size * (DEPTH * of_block + outside)


def expected(card: str, machine: Machine, residual: str, rows: Sequence[dict]) -> dict[str, float]:
    """Return expected milliseconds of the parts of a step with 32 images, and its launch sites.

    Matmuls as estimated, attention as measured on an H200 (else by its bytes), the rest by bytes;
    the stack of dq, dk and dv is part of the elementwise kernels. Launch sites are those without
    the optimizer's.
    """
    batch, milliseconds = BATCHES[0], 1e3 / machine.memory
    pieces = {name: traffic.committed(name, batch, residual) for name in traffic.PIECES}
    matmuls = {name: sum(row["matmul_ms"][card] for row in of) for name, of in pieces.items()}
    sites = {name: sum(row["launches"] for row in of) for name, of in pieces.items()}

    def attention(piece: str, *shape: int) -> float:
        wanted = {"op": "attention", "shape": [batch, *shape], "dtype": "bf16"}
        found = [best(rows, **wanted, mode=row["pass"]) for row in pieces[piece]]
        if None in found:
            return milliseconds * traffic.moved(piece, batch, residual, ("attention",))
        return sum(row["ms_p50"] for row in found)

    parts = step_parts(work(presets.get(PRESET)), batch)
    frozen = matmuls["encoder"] + milliseconds * traffic.moved("encoder", batch)
    return {
        "matmuls": DEPTH * matmuls["block"] + matmuls["outside"],
        "attention": DEPTH * attention("block", 16, 256, 72),
        "elementwise": milliseconds * elementwise_bytes(batch, residual),
        "optimizer and EMA": milliseconds * parts["optimizer and EMA"][1],
        "encoder": frozen + ENCODER_DEPTH * attention("encoder", 12, 257, 64),
        "stack": milliseconds * DEPTH * traffic.moved("block", batch, residual, ("stack",)),
        "launch sites": DEPTH * sites["block"] + sites["outside"] + sites["encoder"],
    }


def expected_table(machine: Machine, rows: Sequence[dict]) -> list[str]:
    """Return what a step is expected to take on an H100 and an H200."""
    cards = {"H100": H100, "H200": machine}
    cases = [(card, residual) for card in cards for residual in ("fp32", "bf16")]
    columns = [expected(card, cards[card], residual, rows) for card, residual in cases]
    lines = [(part, *(f"{one[part]:.1f}" for one in columns)) for part in CATEGORIES]
    sums = [sum(one[part] for part in CATEGORIES) for one in columns]
    lines.append(("sum", *(f"{each:.1f}" for each in sums)))
    packed = (f"{each - one['stack']:.1f}" for each, one in zip(sums, columns))
    lines.append(("sum, attention with packed gradients", *packed))
    lines.append(("launch sites", *(f"{one['launch sites']:,}" for one in columns)))
    names = (f"{card}, {residual} residual" for card, residual in cases)
    return grid((f"{BATCHES[0]} images, expected ms", *names), lines)


def step_table(batch: int, machine: Machine, rows: Sequence[dict]) -> list[str]:
    """Return the table of the step's parts, of their sum and of the step itself."""
    ours = [row for row in rows if row.get("compile") and "ms_by_category" in row]
    wanted = {"preset": PRESET, "batch": batch, "data": "made up"}
    found = {rung: latest(ours, rung=rung, **wanted) for rung in STEP_RUNGS}
    parts = found[PARTS_RUNG]
    lines, total, kernels = [], (0.0, 0.0, 0.0), 0.0

    def add(name: str, flops: float, nbytes: float, least: float, row: dict | None) -> None:
        counted = f"{flops / 1e12:.2f}" if flops else "", f"{nbytes / 1e9:.1f}" if nbytes else ""
        lines.append((name, *counted, f"{least:.1f}", *compared(least, row)))

    for part, (flops, nbytes) in step_parts(work(presets.get(PRESET)), batch).items():
        least = 1e3 * (flops / machine.matmul + nbytes / machine.memory)
        if part == "attention":  # one kernel computes while it moves
            least = floor(flops, nbytes, machine)
        row = None
        if parts is not None:
            milliseconds = sum(parts["ms_by_category"][name] for name in CATEGORIES[part])
            row, kernels = {**parts, "ms_p50": milliseconds}, kernels + milliseconds
        add(part, flops, nbytes, least, row)
        total = tuple(a + b for a, b in zip(total, (flops, nbytes, least)))
    add("sum", *total, parts and {**parts, "ms_p50": kernels})
    add("the step", *total, next((found[rung] for rung in STEP_RUNGS if found[rung]), None))
    heads = (f"{PRESET}, {batch} images", "TFLOP", "GB", "floor, ms", "measured, ms", "ratio", "of")
    return grid(heads, lines)


def rates(rows: Sequence[dict]) -> tuple[Machine, str]:
    """Return the machine that floors are counted for, and a line about its rates and the card."""
    machine, where = Machine(), "an H200 as reported"
    card = latest(rows, item="card")
    if card is not None:
        copy, matmul = 1e12 * card["copy_tb_per_s"], 1e12 * card["matmul_tflop_per_s"]
        machine = Machine(matmul=matmul, memory=copy)
        where = f"{card['device']}, measured {card['date']}, commit {card['commit']}"
    return machine, (
        f"{machine.matmul / 1e12:.0f} TFLOP/s in a bf16 matmul, "
        f"{machine.memory / 1e12:.2f} TB/s in a copy ({where})"
    )


def tables(results: Path) -> str:
    """Return what stands between the marks of the page."""
    rows = [r for r in from_gpus(results) if r.get("status", "ok") == "ok"]
    machine, where = rates(rows)
    lines = [f"Rates: {where}.", "", *ops_table(machine, rows)]
    for batch in BATCHES:
        lines += step_table(batch, machine, rows)
    counts = [row for row in read(traffic.FILE) if row["batch"] == BATCHES[0]]
    lines += [*traffic.table(counts), *expected_table(machine, rows)]
    return "\n".join(lines).rstrip()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, write them into the page, or compare the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    parser.add_argument("--check", action="store_true", help="fail where the page is not current")
    arguments = parser.parse_args(argv)
    text, old = tables(RESULTS), PAGE.read_text()
    new = filled(old, "roofline", text)
    if arguments.check:
        return int(not is_current(PAGE, old, new))
    if arguments.write:
        PAGE.write_text(new)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
