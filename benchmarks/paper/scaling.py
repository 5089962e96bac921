"""Scaling on paper: `python -m benchmarks.paper.scaling` writes docs/scaling.md and its picture.

The text of the page is written by hand; its tables, and the sentences with figures, stand between
marks and come from benchmarks/paper/scaling_model.py. `--check` fails where the page has others.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.environment import RESULTS, ROOT
from benchmarks.harness.rows import filled, from_gpus, grid, is_current, percent
from benchmarks.paper import scaling_model as model
from benchmarks.paper.scaling_model import MODES, Machine, Step, Work
from benchmarks.paper.scaling_picture import PARTS, draw
from benchmarks.step.optim import BYTES as OPTIMIZER_BYTES
from repa_fast.configs import presets

PAGE = ROOT / "docs" / "scaling.md"
GPUS = tuple(2**i for i in range(11))
SHOWN = (8, 64, 512)  # GPUs of the shorter tables
PAYS = 1.5  # strong scaling ends where twice the GPUs are less than this many times as fast


def measured(preset: str, results: Path) -> list[dict]:
    """Return a preset's rows of the step from GPUs; `batch` is of all `gpus`, one if not said.

    Of benchmarks.step.ladder only configuration graph, the project's own step.
    """
    rows = [row for row in from_gpus(results) if "stall_ms" in row and row["preset"] == preset]
    ours = (row for row in rows if row.get("rung", "") in ("", "graph"))
    return [{"gpus": 1, "parallel": "ddp", **row} for row in ours]


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


@dataclass(frozen=True)
class Page:
    """What is shown: batches are images per GPU, `whole` is the batch of strong scaling."""

    preset: str
    machine: Machine
    batches: tuple[int, ...]
    whole: int
    work: Work
    rows: list[dict]

    @property
    def divided(self) -> tuple[int, ...]:
        """Numbers of GPUs among which the whole batch can be divided."""
        return tuple(gpus for gpus in GPUS if self.whole % gpus == 0)

    def steps(self, gpus: int, batch: float, **changes: float) -> dict[str, Step]:
        """Return the step in every mode, with constants of the machine changed."""
        machine = dataclasses.replace(self.machine, **changes)
        return {
            name: model.step(self.work, machine, mode, gpus, batch) for name, mode in MODES.items()
        }

    def fastest(self, gpus: int, batch: float, **changes: float) -> tuple[str, Step]:
        """Return the fastest mode and its step, the first of equal ones."""
        return min(self.steps(gpus, batch, **changes).items(), key=lambda pair: pair[1].seconds)


def subject(page: Page) -> list[str]:
    """Say what the figures are of."""
    each = " or ".join(map(str, page.batches))
    return [f"Preset `{page.preset}`, {each} images per GPU, or {page.whole} in all."]


def measurements(page: Page) -> list[str]:
    """Show rows of the step benchmark, each beside the model at the same point."""
    if not page.rows:
        return ["No measured point exists yet."]
    heads = ("device", "GPUs", "mode", "images each", "compile", "ms p20", "p50", "p80", "commit")
    lines = []
    for row in page.rows:
        gpus, batch = row["gpus"], row["batch"] / row["gpus"]
        point = page.steps(gpus, batch)[row["parallel"]]
        times = (f"{row[f'ms_p{p}']:.2f}" for p in (20, 50, 80))
        named = (row["device"], gpus, row["parallel"], f"{batch:g}", row["compile"])
        lines.append((*named, *times, row["commit"], ms(point.seconds)))
    return grid((*heads, "the model's ms"), lines)


def sharding(page: Page) -> list[str]:
    """Say when sharding wins."""
    lines, node = [], page.machine.node
    for batch in page.batches:
        at = {gpus: page.steps(gpus, batch) for gpus in GPUS}
        ddp, fsdp = at[node]["ddp"], at[node]["fsdp"]
        late = [g for g in GPUS if at[g]["fsdp"].seconds > 1.01 * at[g]["hsdp"].seconds]
        when = f"from {late[0]} GPUs on" if late else f"at no size up to {GPUS[-1]:,} GPUs"
        lines += [
            f"- {batch} images on each of {node} GPUs: a step takes {ms(fsdp.seconds)} ms with "
            f"fsdp and {ms(ddp.seconds)} ms with ddp, "
            f"{100 * (1 - fsdp.seconds / ddp.seconds):.1f} % less. The optimizer takes "
            f"{ms(fsdp.optimizer)} instead of {ms(ddp.optimizer)} ms; exposed communication takes "
            f"{ms(fsdp.communication)} instead of {ms(ddp.communication)} ms. fsdp over all GPUs "
            f"is more than 1 % slower than hsdp {when}."
        ]
    return lines


def ending(page: Page) -> list[str]:
    """Say where strong scaling ends."""
    best = {gpus: page.fastest(gpus, page.whole / gpus) for gpus in page.divided}
    times = {gpus: found.seconds for gpus, (_, found) in best.items()}
    ends = [gpus for gpus in page.divided[1:] if times[gpus // 2] / times[gpus] < PAYS]
    least = min(times, key=times.get)
    graph = {g: page.fastest(g, page.whole / g, launches=0) for g in page.divided}
    quick = min(graph, key=lambda gpus: graph[gpus][1].seconds)
    precise = [
        (found.seconds, gpus, name)
        for gpus in page.divided
        for name, found in page.steps(gpus, page.whole / gpus).items()
        if MODES[name].reduce_bytes == 4
    ]
    seconds, gpus, name = min(precise)
    end = f"from {ends[0] // 2} to {ends[0]} GPUs" if ends else "nowhere"
    return [
        f"- With {page.whole} images in all and the fastest mode at each size, the first doubling "
        f"of GPUs that makes the step less than {PAYS:g} times as fast is {end}.",
        f"- The shortest step takes {ms(times[least])} ms, on {least} GPUs ({best[least][0]}). It "
        f"is {times[1] / times[least]:.0f} times as fast as on one GPU, an efficiency of "
        f"{percent(times[1] / times[least] / least, 0)}.",
        f"- With gradients reduced in fp32 it takes {ms(seconds)} ms, on {gpus} GPUs ({name}).",
        f"- If launches cost nothing it takes {ms(graph[quick][1].seconds)} ms, on {quick} GPUs "
        f"({graph[quick][0]}).",
    ]


def limits(page: Page) -> list[str]:
    """Name the largest parts at each scale."""
    rows = []
    for gpus in GPUS:
        row = [gpus]
        for batch in (page.batches[0], page.whole / gpus):
            if batch < 1:
                row += ["", "less than one image per GPU"]
                continue
            mode, found = page.fastest(gpus, batch)
            parts = sorted(dataclasses.asdict(found).items(), key=lambda part: -part[1])[:3]
            shares = (f"{PARTS[name][0]} {percent(s / found.seconds, 0)}" for name, s in parts)
            row += ["" if gpus == 1 else mode, ", ".join(shares)]
        rows.append(row)
    heads = ("GPUs", f"{page.batches[0]} each", "largest parts", f"{page.whole} in all")
    return grid((*heads, "largest parts"), rows)


def sensitivity(page: Page) -> list[str]:
    """Show the fastest step with one assumption changed."""
    some = page.divided[2 * len(page.divided) // 3], page.divided[-1]
    points = [(SHOWN[-1], page.batches[0]), *((gpus, page.whole / gpus) for gpus in some)]
    now = page.machine
    hops = ("ring_nvlink", "ring_network", "tree_nvlink", "tree_network")
    changes = {
        "as assumed": {},
        "70 % of the rates reached": {"reached": 0.7},
        "launches at no cost": {"launches": 0},
        "no noise": {"noise": 0},
        "three times the noise": {"noise": 3 * now.noise},
        "half the network": {"network": now.network / 2},
        "twice the network": {"network": now.network * 2},
        "half the time of every hop": {name: getattr(now, name) / 2 for name in hops},
    }
    rows = []
    for label, change in changes.items():
        found = [page.fastest(*point, **change) for point in points]
        rows.append((label, *(f"{ms(each.seconds)} ({mode})" for mode, each in found)))
    return grid(("", *(f"{gpus} GPUs, {batch:g} each" for gpus, batch in points)), rows)


def constants(page: Page) -> list[str]:
    """List every constant and its source."""
    rows = []
    for each in dataclasses.fields(Machine):
        value = getattr(page.machine, each.name) / each.metadata["scale"]
        rows.append((each.name, f"{value:g} {each.metadata['unit']}", each.metadata["source"]))
    return grid(("constant", "value", "source"), rows)


def amounts(page: Page) -> list[str]:
    """Count FLOPs and bytes of a step, and the floor that follows from them."""
    w, gpus = page.work, SHOWN[1]
    passes = {"encoder or teacher": w.frozen, "forward": w.forward, "backward": w.backward}
    rows = [(n, f"{p.flops / 1e9:.1f}", f"{p.nbytes / 1e6:.1f}") for n, p in passes.items()]
    shards = [mode.shards(page.machine, gpus) for mode in MODES.values()]
    moved = [f"{sum(OPTIMIZER_BYTES.values()) / n:.3g}" for n in shards]
    copied = [f"{sum(model.copies(m, n, gpus)):.3g}" for m, n in zip(MODES.values(), shards)]
    ideal = dataclasses.replace(page.machine, reached=1.0)
    ones = [model.step(w, ideal, MODES["ddp"], 1, batch) for batch in page.batches]
    floors = [ms(one.matmul + one.elementwise + one.optimizer) for one in ones]
    memory = [f"{(batch * w.activation_bytes + w.state_bytes) / 1e9:.0f}" for batch in page.batches]
    parameters = f"bytes for each of {w.parameters / 1e6:.1f} M parameters, {gpus} GPUs"
    ways = ("optimizer, EMA, norm", *moved), ("casts and copies of weights", *copied)
    one = ("ms, both rates reached in full, no copies, no launches", *floors)
    two = ("GB of state and activations", *memory)
    return [
        *grid(("per image", "GFLOP of matmuls", "MB of elementwise kernels"), rows),
        *grid((parameters, *MODES), ways),
        *grid(("images on one GPU", *page.batches), (one, two)),
    ]


def sent(page: Page) -> list[str]:
    """Show volumes and times of collectives, and what is exposed of them."""
    rows = []
    for gpus in SHOWN:
        for name, mode in MODES.items():
            found = model.communication(page.work, page.machine, mode, gpus)
            steps = [page.steps(gpus, batch)[name] for batch in page.batches]
            nbytes = (f"{each / 1e9:.2f}" for each in volumes(page, name, gpus))
            times = (found.forward, found.backward, *(each.communication for each in steps))
            rows.append((gpus, name, *nbytes, *map(ms, times)))
    heads = ("GPUs", "mode", "GB sent by a GPU", "GB leaving a node", "forward, ms", "backward, ms")
    return grid((*heads, *(f"exposed, {batch} images each" for batch in page.batches)), rows)


def volumes(page: Page, name: str, gpus: int) -> tuple[float, float]:
    """Return the bytes that a GPU sends in a step, and that leave its node."""
    mode, nodes = MODES[name], page.machine.nodes(gpus)
    gradients = mode.reduce_bytes * page.work.parameters
    if mode.sharded == "no":
        ring = model.volume("all-reduce", gpus) * gradients
    else:
        ranks = mode.shards(page.machine, gpus)
        ring = model.volume("all-gather", ranks) * (2 * page.work.parameters + gradients)
    if nodes == 1 or mode.sharded != "node":
        return ring, ring if nodes > 1 else 0.0
    across = model.volume("all-reduce", nodes) * gradients
    return ring + across / page.machine.node, across


def table(page: Page, points: Iterable[tuple[int, float]]) -> list[str]:
    """Show milliseconds in every mode, and the fastest one's rate."""
    rows, alone = [], None
    for gpus, batch in points:
        found = [each.seconds for each in page.steps(gpus, batch).values()]
        rate = gpus * batch / min(found)
        alone = alone or rate
        least = ms(min(found)) if gpus > 1 else ""
        cells = (f"**{ms(t)}**" if ms(t) == least else ms(t) for t in found)
        rows.append((gpus, f"{batch:g}", *cells, f"{rate:,.0f}", percent(rate / gpus / alone, 0)))
    return grid(("GPUs", "images each", *MODES, "images/s", "efficiency"), rows)


def weak(page: Page) -> list[str]:
    """Show weak scaling: images per GPU fixed."""
    return [
        line for batch in page.batches for line in table(page, [(gpus, batch) for gpus in GPUS])
    ]


def strong(page: Page) -> list[str]:
    """Show strong scaling: images in all fixed."""
    return table(page, [(gpus, page.whole / gpus) for gpus in page.divided])


def stragglers(page: Page) -> list[str]:
    """Show what waiting for the slowest GPU costs."""
    expected = [model.expected_maximum(gpus) for gpus in GPUS]
    longer = [f"{100 * page.machine.noise * each:.1f} %" for each in expected]
    rows = (
        ("deviations, expected", *(f"{each:.2f}" for each in expected)),
        ("longer step", *longer),
    )
    return grid(("GPUs", *GPUS), rows)


def checkpoints(page: Page) -> list[str]:
    """Show the pause of a checkpoint and its writing."""
    w, now, batch, rows = page.work, page.machine, page.batches[0], []
    for name in ("ddp", "fsdp", "hsdp"):
        for gpus in SHOWN:
            seconds = page.steps(gpus, batch)[name].seconds
            pause = w.checkpoint_bytes / MODES[name].shards(now, gpus) / now.host_copy
            write = w.checkpoint_bytes / now.file_rate(gpus)
            period = w.checkpoint_steps * seconds
            shares = (f"{100 * t / (period + t):.4f} %" for t in (pause, pause + write))
            times = (f"{pause:.4f}", f"{write:.2f}", f"{write / seconds:.0f}")
            rows.append((name, gpus, *times, *shares))
    heads = ("mode", "GPUs", "pause, s", "write, s", "steps during the write", "lost, asynchronous")
    size = f"{w.checkpoint_bytes / 1e9:.2f} GB every {w.checkpoint_steps:,} steps"
    return [f"{size}, {batch} images per GPU.", "", *grid((*heads, "lost, synchronous"), rows)]


def data(page: Page) -> list[str]:
    """Show the bytes per second that training reads."""
    batch, rows = page.batches[0], []
    scales = (*SHOWN, GPUS[-1])
    for name, nbytes in page.work.image_bytes.items():
        cells = []
        for gpus in scales:
            free = page.fastest(gpus, batch, files=1e18, files_node=1e18)[1]
            need = gpus * batch * nbytes / free.seconds
            text = f"{need / 1e9:.2f}"
            cells.append(f"**{text}**" if need > page.machine.file_rate(gpus) else text)
        rows.append((name, f"{nbytes / 1e3:.1f}", *cells))
    text = f"GB/s with {batch} images per GPU. The other tables assume {model.usual(page.work)}."
    return [text, "", *grid(("a row has", "kB", *(f"{gpus} GPUs" for gpus in scales)), rows)]


SECTIONS = (
    subject, measurements, sharding, ending, limits, sensitivity, constants, amounts, sent, weak,
    strong, stragglers, checkpoints, data,
)  # fmt: skip


def written(text: str, page: Page) -> str:
    """Return the page's text with every section between its marks written anew."""
    for section in SECTIONS:
        text = filled(text, section.__name__, "\n".join(section(page)).rstrip())
    return text


def main() -> int:
    """Write the page and the picture, or compare the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="sit-xl2-repa", choices=presets.PRESETS)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256], help="images per GPU")
    parser.add_argument("--global-batch", type=int, default=256, help="of strong scaling")
    parser.add_argument("--out", type=Path, default=PAGE, help="a page with the same marks, or new")
    parser.add_argument("--check", action="store_true", help="fail where the page is not current")
    for each in dataclasses.fields(Machine):
        name, text = each.name.replace("_", "-"), f"SI units; {each.metadata['source']}"
        help_text = text.replace("%", "%%")
        parser.add_argument(f"--{name}", type=each.type, default=each.default, help=help_text)
    given = parser.parse_args()
    machine = Machine(**{e.name: getattr(given, e.name) for e in dataclasses.fields(Machine)})
    counted, rows = model.work(presets.get(given.preset)), measured(given.preset, RESULTS)
    page = Page(given.preset, machine, tuple(given.batch), given.global_batch, counted, rows)
    out = given.out
    old = (out if out.exists() else PAGE).read_text()
    new = written(old, page)
    if given.check:
        return int(not is_current(out, old, new))
    out.write_text(new)
    picture = out.parent / "images" / "scaling.png"
    picture.parent.mkdir(exist_ok=True)
    weak_steps = {gpus: page.steps(gpus, page.batches[0]) for gpus in GPUS}
    strong_steps = {gpus: page.steps(gpus, page.whole / gpus) for gpus in page.divided}
    draw(picture, weak_steps, strong_steps, page.batches[0], page.whole, page.rows, page.preset)
    return 0


if __name__ == "__main__":
    sys.exit(main())
