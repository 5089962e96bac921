"""What rounding costs a trained digits model: `python -m benchmarks.sample.precision --ckpt RUN`.

The same images (noise, labels, increments) are sampled in fp64 throughout, the oracle, and in
the precisions that sampling offers. Two figures of each: the RMS distance of its latents to the
oracle's over the RMS of the oracle's, and the Frechet distance of its pictures to the training
digits, in the features of the digits judge. The row "fp32, another seed" is the yardstick: as far
as that are two sets of pictures that differ by chance alone.
"""

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness.environment import parser, results_folder, stamp
from benchmarks.harness.rows import append, facts, grid, latest, read
from repa_fast.configs.sampler import SamplerConfig
from repa_fast.data.digits import digit_images
from repa_fast.data.latents import to_pixels
from repa_fast.diffusion import samplers
from repa_fast.encoders.digits import DigitsJudge
from repa_fast.eval.load import Loaded, load
from repa_fast.eval.sampling import ImageSampler, labels_of
from repa_fast.eval.scores import frechet_distance, statistics

CPU = torch.device("cpu")
SAMPLERS = {"ode": 50, "sde": 250}  # mode -> steps, those of REPA's examples
ORACLE, CHANCE = "fp64", "fp32, another seed"
PRECISIONS = {
    "fp32, fp64 state": {"state_dtype": "fp64"},
    "fp32, fp32 state": {"state_dtype": "fp32"},
    "bf16, fp64 state": {"mixed_precision": "bf16", "state_dtype": "fp64"},
    "bf16, fp32 state": {"mixed_precision": "bf16", "state_dtype": "fp32"},
}
"""Name -> settings; bf16 is autocast over fp32 weights."""
BATCH = 100


def latents_of(
    loaded: Loaded, config: SamplerConfig, count: int, seed: int = 0, exact: bool = False
) -> torch.Tensor:
    """Sample latents (count, C, h, w) as ImageSampler does, or all in fp64; return fp64."""
    sampler, parts = ImageSampler(loaded, config, CPU), []
    double = copy.deepcopy(loaded.model).double()
    for index in np.array_split(np.arange(count), -(-count // BATCH)):
        labels = labels_of(index, loaded.model.num_classes, 0, "balanced")
        if not exact:
            parts.append(sampler.latents(index, labels, seed).double())
            continue
        latents = samplers.sample(
            double,
            sampler.noise(index, seed).double(),
            torch.from_numpy(labels),
            mode=config.mode,
            num_steps=config.num_steps,
            cfg_scale=config.cfg_scale,
            path=loaded.objective.path,
            prediction=loaded.objective.prediction,
            seed=seed,
            index=torch.from_numpy(index),
        )
        parts.append(latents)
    return torch.cat(parts)


def measure(
    loaded: Loaded, mode: str, num_steps: int, cfg_scale: float, count: int
) -> Iterator[dict]:
    """Return a row for the oracle and each precision, as they are ready."""
    judge = DigitsJudge()

    def moments(images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            return statistics(judge.features(images).numpy())

    train, _ = digit_images("train")
    real = moments(torch.from_numpy(train.transpose(0, 3, 1, 2).copy()))
    plain = SamplerConfig(mode=mode, num_steps=num_steps, cfg_scale=cfg_scale)
    oracle = latents_of(loaded, plain, count, exact=True)
    pictures = to_pixels(oracle, loaded.metadata)

    def row(precision: str, latents: torch.Tensor) -> dict:
        images = to_pixels(latents, loaded.metadata)
        changed = (images != pictures).float().mean().item()
        error = (latents - oracle).square().mean()
        found = {"mode": mode, "num_steps": num_steps, "cfg_scale": cfg_scale, "samples": count}
        found |= {"step": loaded.step, "weights": loaded.digest, "precision": precision}
        found |= {"relative_rms_error": (error / oracle.square().mean()).sqrt().item()}
        found |= {"changed_values": changed, **stamp()}
        return found | {"frechet_distance": frechet_distance(*moments(images), *real)}

    yield row(ORACLE, oracle)
    for name, settings in PRECISIONS.items():
        yield row(name, latents_of(loaded, dataclasses.replace(plain, **settings), count))
    yield row(CHANCE, latents_of(loaded, plain, count, seed=1))


def markdown(rows: list[dict]) -> str:
    """Return a table per sampler, of the last rows."""
    rows = latest(rows, lambda row: (row["mode"], row["num_steps"], row["precision"]))
    lines = ["# Precision of sampling", "", *facts(rows[-1:]), ""]
    lines += [*__doc__.split("\n\n", 1)[1].splitlines(), ""]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        members = [row for row in rows if row["mode"] == mode]
        first = members[0]
        heads = ("precision", "relative RMS error", "pixel values changed", "Frechet distance")
        body = [
            (
                row["precision"],
                f"{row['relative_rms_error']:.2e}",
                f"{100 * row['changed_values']:.2f} %",
                f"{row['frechet_distance']:.4f}",
            )
            for row in members
        ]
        lines += [
            f"## {mode.upper()}, {first['num_steps']} steps",
            "",
            f"{first['samples']} images, guidance {first['cfg_scale']:g}, weights "
            f"{first['weights']} of step {first['step']}. `{first['command']}`",
            "",
            *grid(heads, body),
        ]
    return "\n".join(lines)


def main() -> None:
    """Measure, append the rows as they are ready and write their report."""
    flags = parser(__doc__.splitlines()[0], "folder of the rows and the report", device=False)
    flags.add_argument("--ckpt", type=Path, required=True, help="a run on the digits")
    flags.add_argument("--mode", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    flags.add_argument("--num-steps", type=int, help="instead of 50 (ode) and 250 (sde)")
    flags.add_argument("--samples", type=int, default=500)
    flags.add_argument("--cfg-scale", type=float, default=2.5)
    options = flags.parse_args()
    loaded = load(options.ckpt)
    folder = options.out or results_folder("sampling-precision", "cpu")
    for mode in options.mode:
        steps = options.num_steps or SAMPLERS[mode]
        for row in measure(loaded, mode, steps, options.cfg_scale, options.samples):
            print(json.dumps(row), flush=True)
            append(folder / "rows.jsonl", row)
    (folder / "report.md").write_text(markdown(read(folder / "rows.jsonl")))


if __name__ == "__main__":
    main()
