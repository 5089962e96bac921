"""`repa-fast sweep`: scores against training steps, guidance scales and guidance intervals."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from repa_fast.checkpoint.layout import run_checkpoints
from repa_fast.contracts import expect_choice, expect_writable
from repa_fast.distributed import session
from repa_fast.eval.generate import GenerateConfig, folder_of, generate
from repa_fast.eval.metrics import Scorer, tell
from repa_fast.eval.pictures import markdown, over_points
from repa_fast.eval.records import SWEEP
from repa_fast.eval.reference import ImageFile
from repa_fast.eval.spaces import ScoreConfig
from repa_fast.whole import write_whole


@dataclass(kw_only=True)
class SweepConfig(GenerateConfig, ScoreConfig):
    """`repa-fast sweep`: generate and score images at every combination of what is varied."""

    all_steps: bool = False
    """Every checkpoint of the run CKPT."""
    cfg_scales: tuple[float, ...] = ()
    """Guidance scales; CFG_SCALE alone where none is given."""
    guidance_highs: tuple[float, ...] = ()
    """Upper ends of the guidance interval; GUIDANCE_HIGH alone where none is given."""
    plotted: str = ""
    """The score that is plotted; the first one where empty."""


def sweep(config: SweepConfig) -> str:
    """Score every combination; images that are there already are not made again.

    Every process of torchrun calls it.

    Returns:
        A Markdown table; sweep.json, sweep.md and sweep.png are in SAMPLE_DIR. Empty on processes
        other than the first.
    """
    out = folder_of(config)
    expect_writable("sample_dir", out, folder=True)
    runs = run_checkpoints(Path(config.ckpt)) if config.all_steps else [Path(config.ckpt)]
    scales = config.cfg_scales or (config.cfg_scale,)
    highs = config.guidance_highs or (config.guidance_high,)
    points = []
    with session() as world:
        scorer = Scorer(config, world)
        refused = scorer.refused(config.num_fid_samples)
        if config.plotted in refused:
            raise ValueError(f"plotted: {config.plotted} is refused, {refused[config.plotted]}")
        if world.is_main:
            tell(refused, "generate more (--num-fid-samples)")
        real = scorer.real
        for source, scale, high in itertools.product(runs, scales, highs):
            varied = {"cfg_scale": scale, "guidance_high": high}
            path = generate(replace(config, ckpt=str(source), sample_dir=str(out), **varied))
            world.barrier()  # the first process has joined the images
            found = scorer.compare(scorer.measure_file(ImageFile(path, config.num_fid_samples)))
            step = int(source.name) if config.all_steps else None
            points.append({"step": step, **varied, **found})
        if not world.is_main:
            return ""
    results = {
        "points": points,
        "refused": refused,
        "reference": {"name": real.name, "count": real.count},
        "features": scorer.space.name,
        "classifier": scorer.space.classifier(),
        "settings": asdict(config),
    }
    written = table(results, str(scorer.space))
    write_whole(out / SWEEP, json.dumps(results, indent=2) + "\n")
    write_whole(out / "sweep.md", written + "\n")
    _plot(points, config, out / "sweep.png")
    return f"{written}\n\n{out / 'sweep.png'}"


def table(results: dict, features: str) -> str:
    """Return the points as Markdown, with what they are of."""
    points, settings, reference = results["points"], results["settings"], results["reference"]
    rows = [
        [f"{value:.4g}" if isinstance(value, float) else str(value or "") for value in of.values()]
        for of in points
    ]
    about = (
        f"{settings['num_fid_samples']} samples each of the weights {settings['weights']}, seed "
        f"{settings['global_seed']}; reference: "
        f"{reference['name']}, {reference['count']} images; features: {features}."
    )
    about += "".join(f" {name}: refused, {why}." for name, why in results["refused"].items())
    return "\n".join([*markdown(list(points[0]), rows), "", about])


def _plot(points: Sequence[dict], config: SweepConfig, out: Path) -> None:
    varied, found = list(points[0])[:3], list(points[0])[3:]
    score = config.plotted or found[0]
    expect_choice("plotted", score, found)
    several = [name for name in varied if len({point[name] for point in points}) > 1]
    axis, *others = several or ["cfg_scale"]
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        name = ", ".join(f"{other} {point[other]:g}" for other in others)
        lines.setdefault(name, []).append((point[axis], point[score]))
    over_points(lines, axis, score, out)
