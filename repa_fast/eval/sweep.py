"""`repa-fast sweep`: scores against training steps, guidance scales and guidance intervals."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from repa_fast.distributed import World, session
from repa_fast.eval.generate import GenerateConfig, generate
from repa_fast.eval.metrics import (
    EvalConfig,
    Measured,
    Space,
    compare,
    feature_space,
    measure,
    measured_reference,
)
from repa_fast.eval.plots import over_points
from repa_fast.eval.reference import ImageFile, fingerprint
from repa_fast.eval.strip import run_checkpoints
from repa_fast.ledger import write_whole


@dataclass(kw_only=True)
class SweepConfig(GenerateConfig, EvalConfig):
    """`repa-fast sweep`: generate and judge images at every combination of what is varied."""

    all_steps: bool = False
    """Every checkpoint of the run CKPT."""
    cfg_scales: tuple[float, ...] = ()
    """Guidance scales; CFG_SCALE alone where none is given."""
    guidance_highs: tuple[float, ...] = ()
    """Upper ends of the guidance interval; GUIDANCE_HIGH alone where none is given."""
    plotted: str = ""
    """The score that is plotted; the first one where empty."""


def sweep(config: SweepConfig) -> str:
    """Every process of torchrun calls it; images that are there already are not made again.

    Returns:
        A Markdown table; sweep.json, sweep.md and sweep.png are in SAMPLE_DIR. Empty on processes
        other than the first.

    Raises:
        ValueError, RuntimeError: as `generate` and `repa_fast.eval.metrics.evaluate`.
    """
    if bool(config.reference) == bool(config.dataset):
        raise ValueError("reference and dataset: expected one of them, to compare with")
    runs = run_checkpoints(Path(config.ckpt)) if config.all_steps else [Path(config.ckpt)]
    scales = config.cfg_scales or (config.cfg_scale,)
    highs = config.guidance_highs or (config.guidance_high,)
    points = []
    with session() as world:
        space = feature_space(config, world.device)
        real = measured_reference(config, space, world)
        for source, scale, high in itertools.product(runs, scales, highs):
            chosen = replace(
                _part(config, GenerateConfig), ckpt=str(source), cfg_scale=scale, guidance_high=high
            )
            scores = _score(chosen, config, real, space, world)
            step = int(source.name) if config.all_steps else None
            points.append({"step": step, "cfg_scale": scale, "guidance_high": high, **scores})
        if not world.is_main:
            return ""
    results = {
        "points": points,
        "reference": {"name": real.name, "count": real.count},
        "features": space.name,
        "settings": asdict(config),
    }
    out = Path(config.sample_dir)
    written = table(results)
    write_whole(out / "sweep.json", json.dumps(results, indent=2) + "\n")
    write_whole(out / "sweep.md", written + "\n")
    _plot(points, config, out / "sweep.png")
    return f"{written}\n\n{out / 'sweep.png'}"


def _score(
    chosen: GenerateConfig, config: SweepConfig, real: Measured, space: Space, world: World
) -> dict[str, float]:
    path = generate(chosen)
    world.barrier()  # the first process has joined the images
    file = ImageFile(path, config.num_fid_samples)
    batches = file.batches(config.batch_size, world.rank, world.size)
    name = f"{path.name}, sha256 {fingerprint(path)}"
    return compare(real, measure(name, batches, file.count, space, world), config)


def _part(config: SweepConfig, kind: type) -> GenerateConfig:
    return kind(**{field.name: getattr(config, field.name) for field in fields(kind)})


def table(results: dict) -> str:
    """The points as Markdown."""
    points = results["points"]
    names = list(points[0])
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for point in points:
        cells = (f"{v:.4g}" if isinstance(v, float) else str(v or "") for v in point.values())
        lines.append(f"| {' | '.join(cells)} |")
    count, reference = results["settings"]["num_fid_samples"], results["reference"]
    lines += [
        "",
        f"{count} samples each, seed {results['settings']['global_seed']}; reference: "
        f"{reference['name']}, {reference['count']} images; features: {results['features']}.",
    ]
    return "\n".join(lines)


def _plot(points: Sequence[dict], config: SweepConfig, out: Path) -> None:
    varied = [
        name
        for name in ("step", "cfg_scale", "guidance_high")
        if len({point[name] for point in points}) > 1
    ] or ["cfg_scale"]
    score = config.plotted or list(points[0])[3]
    if score not in points[0]:
        raise ValueError(f"plotted is {score!r}, expected one of {', '.join(list(points[0])[3:])}")
    axis, *others = varied
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        name = ", ".join(f"{other} {point[other]:g}" for other in others)
        lines.setdefault(name, []).append((point[axis], point[score]))
    over_points(lines, axis, score, out)
