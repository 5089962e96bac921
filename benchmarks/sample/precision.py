"""What rounding costs a trained digits model: `python -m benchmarks.sample.precision --ckpt RUN`.

The same images (noise, labels, increments) are sampled in fp64 throughout, the oracle, and in
the precisions that sampling offers. Two figures of each: the RMS distance of its latents to the
oracle's over the RMS of the oracle's, and the Frechet distance of its pictures to the training
digits, in the features of the digits judge. The row "fp32, another seed" is the yardstick: as far
as that are two sets of pictures that differ by chance alone.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness.environment import RESULTS, stamp
from repa_fast.data.digits import digit_images
from repa_fast.data.latents import to_pixels
from repa_fast.diffusion import samplers
from repa_fast.diffusion.path import get
from repa_fast.encoders.digits import DigitsJudge
from repa_fast.eval.fid import frechet_distance, statistics
from repa_fast.eval.load import Loaded, load
from repa_fast.eval.sampling import ImageSampler, SamplerConfig, labels_of

CPU = torch.device("cpu")
SAMPLERS = {"ode": 50, "sde": 250}
"""Mode -> steps, those of REPA's examples."""
ORACLE, CHANCE = "fp64", "fp32, another seed"
PRECISIONS = {
    "fp32, fp64 state": {"state_dtype": "fp64"},
    "fp32, fp32 state": {"state_dtype": "fp32"},
    "bf16, fp64 state": {"mixed_precision": "bf16", "state_dtype": "fp64"},
    "bf16, fp32 state": {"mixed_precision": "bf16", "state_dtype": "fp32"},
}
"""Name -> settings; bf16 is autocast over fp32 weights."""
BATCH = 100
STAMP = ("date", "commit", "python", "torch", "device", "cores")


def config_of(mode: str, num_steps: int, cfg_scale: float, **precision: str) -> SamplerConfig:
    """Settings of a sampler at a precision."""
    return SamplerConfig(mode=mode, num_steps=num_steps, cfg_scale=cfg_scale, **precision)


def exact(loaded: Loaded, config: SamplerConfig, index: np.ndarray, seed: int) -> torch.Tensor:
    """Latents (B, C, h, w) of images by their numbers (B), all in fp64."""
    noise = ImageSampler(loaded, config, CPU).noise(index, seed).double()
    return samplers.sample(
        copy.deepcopy(loaded.model).double(),
        noise,
        torch.from_numpy(labels(loaded, index)),
        mode=config.mode,
        num_steps=config.num_steps,
        cfg_scale=config.cfg_scale,
        path=get(loaded.path_type),
        prediction=loaded.prediction,
        seed=seed,
        index=torch.from_numpy(index),
    )


def rounded(loaded: Loaded, config: SamplerConfig, index: np.ndarray, seed: int) -> torch.Tensor:
    """The same as ImageSampler makes them, in the state's dtype."""
    return ImageSampler(loaded, config, CPU).latents(index, labels(loaded, index), seed)


def labels(loaded: Loaded, index: np.ndarray) -> np.ndarray:
    """Classes (B) of images by their numbers (B)."""
    return labels_of(index, loaded.model.num_classes, 0, "balanced")


def by_batches(sample, loaded: Loaded, config: SamplerConfig, count: int, seed: int = 0):
    """Latents (count, C, h, w), fp64, of the first `count` images."""
    parts = np.array_split(np.arange(count), -(-count // BATCH))
    return torch.cat([sample(loaded, config, part, seed).double() for part in parts])


def relative_error(latents: torch.Tensor, oracle: torch.Tensor) -> float:
    """RMS of the difference over the RMS of the oracle."""
    return ((latents - oracle).square().mean() / oracle.square().mean()).sqrt().item()


def measure(
    loaded: Loaded, mode: str, num_steps: int, cfg_scale: float, count: int
) -> Iterator[dict]:
    """A row for the oracle and each precision, as they are ready."""
    judge = DigitsJudge()

    def moments(images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            return statistics(judge.features(images).numpy())

    train, _ = digit_images("train")
    real = moments(torch.from_numpy(train.transpose(0, 3, 1, 2).copy()))
    plain = config_of(mode, num_steps, cfg_scale)
    oracle = by_batches(exact, loaded, plain, count)
    pictures = to_pixels(oracle, loaded.metadata)

    def row(precision: str, latents: torch.Tensor) -> dict:
        images = to_pixels(latents, loaded.metadata)
        changed = (images != pictures).float().mean().item()
        return {
            "mode": mode,
            "num_steps": num_steps,
            "cfg_scale": cfg_scale,
            "samples": count,
            "step": loaded.step,
            "weights": loaded.digest,
            "precision": precision,
            "relative_rms_error": relative_error(latents, oracle),
            "changed_values": changed,
            "frechet_distance": frechet_distance(*moments(images), *real),
            **stamp(),
        }

    yield row(ORACLE, oracle)
    for name, settings in PRECISIONS.items():
        config = config_of(mode, num_steps, cfg_scale, **settings)
        yield row(name, by_batches(rounded, loaded, config, count))
    yield row(CHANCE, by_batches(rounded, loaded, plain, count, seed=1))


def read(path: Path) -> list[dict]:
    """Rows of a file, the last of each sampler and precision."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return list({(row["mode"], row["num_steps"], row["precision"]): row for row in rows}.values())


def markdown(rows: list[dict]) -> str:
    """A table per sampler."""
    lines = ["# Precision of sampling", "", *(f"- {name}: {rows[-1][name]}" for name in STAMP)]
    lines += ["", *__doc__.split("\n\n", 1)[1].splitlines()]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        table = [row for row in rows if row["mode"] == mode]
        first = table[0]
        lines += [
            "",
            f"## {mode.upper()}, {first['num_steps']} steps",
            "",
            f"{first['samples']} images, guidance {first['cfg_scale']:g}, weights "
            f"{first['weights']} of step {first['step']}. `{first['command']}`",
            "",
            "| precision | relative RMS error | pixel values changed | Frechet distance |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {row['precision']} | {row['relative_rms_error']:.2e} "
            f"| {100 * row['changed_values']:.2f} % | {row['frechet_distance']:.4f} |"
            for row in table
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, append the rows as they are ready and write their report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", type=Path, required=True, help="a run on the digits")
    parser.add_argument("--mode", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument("--num-steps", type=int, help="instead of 50 (ode) and 250 (sde)")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--cfg-scale", type=float, default=2.5)
    parser.add_argument("--out", type=Path, help="folder of the rows and the report")
    options = parser.parse_args()
    loaded = load(options.ckpt)
    for mode in options.mode:
        steps = options.num_steps or SAMPLERS[mode]
        for row in measure(loaded, mode, steps, options.cfg_scale, options.samples):
            print(json.dumps(row), flush=True)
            folder = options.out or RESULTS / "cpu" / f"{row['date']}_sampling-precision"
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "rows.jsonl", "a") as rows:
                rows.write(json.dumps(row) + "\n")
    (folder / "report.md").write_text(markdown(read(folder / "rows.jsonl")))


if __name__ == "__main__":
    main()
