"""Evaluates a run on the digits: `python -m repa_fast.eval.digits RUN`.

Nothing it evaluates with was used in training: a support-vector classifier on pixels, and a feature
net trained by another objective than the aligned encoder.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from repa_fast import command, encoders
from repa_fast.checkpoint import layout
from repa_fast.configs.build import build_model
from repa_fast.configs.config import TrainConfig
from repa_fast.contracts import expect_writable
from repa_fast.data import latents
from repa_fast.data.digits import digit_images, digits_metadata, pixel_moments
from repa_fast.diffusion.alignment import cosine_losses
from repa_fast.diffusion.draws import draw, stream
from repa_fast.eval.scores import frechet_distance, statistics
from repa_fast.models.sit import SiT
from repa_fast.objective import build_objective
from repa_fast.whole import write_whole

CLASSES = 10
ALIGNMENT_DRAWS = 4
"""Times and noises per held-out image, over which its alignment is averaged."""


@dataclass(frozen=True)
class Scores:
    """What a run reached; distances in RMS per pixel of values in [0, 1].

    Attributes:
        weights: model, ema, or ema_2 and so on.
        classifier_accuracy: of the support-vector classifier on held-out real digits.
        class_accuracy: share of samples it assigns to the class they were asked for.
        frechet_distance: samples against the real training digits, in the judging net's features.
        frechet_distance_held_out: held-out real digits against the same, as a yardstick.
        nearest_neighbour: mean distance of a sample to the nearest training digit.
        nearest_neighbour_held_out: the same of held-out real digits.
        alignment_cosine: projected hidden states against the encoder on held-out digits.
    """

    step: int
    weights: str
    samples: int
    classifier_accuracy: float
    class_accuracy: float
    frechet_distance: float
    frechet_distance_held_out: float
    nearest_neighbour: float
    nearest_neighbour_held_out: float
    alignment_cosine: float | None


def load_run(
    run: Path, step: int | None = None, weights: str = "ema"
) -> tuple[TrainConfig, SiT, int]:
    """Return config, model with these weights, and step of a run's checkpoint (newest if None).

    Raises:
        ValueError: the run has no complete checkpoint, none of that step, or no such weights.
    """
    folder = run / "checkpoints"
    found = layout.steps(folder)
    step = found[-1] if found and step is None else step
    if step not in found:
        raise ValueError(f"{folder} has checkpoints {found}, expected {step or 'at least one'}")
    source = layout.path_of(folder, step)
    settings = layout.read_settings(source)
    model = build_model(settings.config, settings.metadata).eval().requires_grad_(False)
    layout.load_weights(source, model, weights)
    return settings.config, model, step


def expect_whole(run: Path) -> None:
    """Raise ValueError for a run that a signal stopped: its scores would pass for the demo's."""
    config, _, step = load_run(run)
    images = len(digit_images("train")[1])
    last = min(config.max_train_steps, config.epochs * (images // config.images_per_step))
    if step < last:
        raise ValueError(
            f"{run} was stopped at step {step} of {last}, expected a whole run: go on with it "
            f"(--resume auto; `make demo` does), or evaluate it as it is (--step {step})"
        )


def generate(
    config: TrainConfig, model: SiT, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return class-conditional samples, uint8 (count, 3, 16, 16), and their labels (count)."""
    metadata = digits_metadata()
    labels = torch.arange(count) % CLASSES
    generator = stream(seed, 1)
    noise = torch.randn(count, *metadata.latent_shape, generator=generator)
    samples = build_objective(config).sample(model, noise, labels, config.sampler(), seed=seed)
    return latents.to_pixels(samples, metadata).numpy(), labels.numpy()


@torch.no_grad()
def alignment_cosine(config: TrainConfig, model: SiT, seed: int) -> float | None:
    """Return the mean cosine on held-out digits, over times and noise; None without an encoder."""
    specs = encoders.specs(config.enc_type)
    if not specs:
        return None
    metadata, path = digits_metadata(), build_objective(config).path
    pixels, labels = digit_images("val")
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    clean = latents.sample(torch.from_numpy(pixel_moments(pixels)), torch.zeros(()), metadata)
    targets = [encoders.load(spec.name, config.resolution, "cpu")(images) for spec in specs]
    cosines = []
    for repeat in range(ALIGNMENT_DRAWS):
        draws = draw(seed, repeat, len(images), metadata.latent_shape, path=path)
        t = path.model_times(draws.t)
        noisy, _ = path.interpolate(clean, draws.noise, t)
        _, projections = model(noisy, t, torch.from_numpy(labels), project=True)
        cosines += [-loss.mean().item() for loss in cosine_losses(projections, targets)]
    return float(np.mean(cosines))


def evaluate(
    run: Path, *, step: int | None = None, weights: str = "ema", count: int = 500, seed: int = 0
) -> Scores:
    """Compute all scores of a run's checkpoint."""
    from sklearn.svm import SVC

    from repa_fast.encoders.digits import DigitsJudge

    config, model, step = load_run(run, step, weights)
    samples, labels = generate(config, model, count, seed)
    real = {split: digit_images(split) for split in ("train", "val")}
    images = {split: pixels.transpose(0, 3, 1, 2) for split, (pixels, _) in real.items()}
    images["samples"] = samples
    flat = {name: grey(pixels) for name, pixels in images.items()}
    classifier = SVC().fit(flat["train"], real["train"][1])

    judge = DigitsJudge()
    moments = {
        name: statistics(judge.features(torch.from_numpy(pixels.copy())).numpy())
        for name, pixels in images.items()
    }
    return Scores(
        step=step,
        weights=weights,
        samples=count,
        classifier_accuracy=float(classifier.score(flat["val"], real["val"][1])),
        class_accuracy=float(classifier.score(flat["samples"], labels)),
        frechet_distance=frechet_distance(*moments["samples"], *moments["train"]),
        frechet_distance_held_out=frechet_distance(*moments["val"], *moments["train"]),
        nearest_neighbour=nearest_neighbour(flat["samples"], flat["train"]),
        nearest_neighbour_held_out=nearest_neighbour(flat["val"], flat["train"]),
        alignment_cosine=alignment_cosine(config, model, seed),
    )


def grey(images: np.ndarray) -> np.ndarray:
    """Turn uint8 (N, 3, R, R) into float64 (N, R * R) in [0, 1], the mean of the channels."""
    return images.mean(1).reshape(len(images), -1) / 255


def nearest_neighbour(queries: np.ndarray, references: np.ndarray) -> float:
    """Return the mean over queries (N, F) of the RMS distance to the nearest reference (M, F)."""
    from sklearn.neighbors import NearestNeighbors

    distances, _ = NearestNeighbors(n_neighbors=1).fit(references).kneighbors(queries)
    return float(distances.mean() / np.sqrt(queries.shape[1]))


def describe(scores: Scores) -> str:
    """Return the scores as lines for people."""
    which = "" if scores.weights == "ema" else f" of the weights {scores.weights}"
    lines = [
        f"class accuracy: {100 * scores.class_accuracy:.1f} % of {scores.samples} samples{which} "
        f"at step {scores.step} (the classifier on held-out real digits: "
        f"{100 * scores.classifier_accuracy:.1f} %)",
        f"Frechet distance: {scores.frechet_distance:.2f} "
        f"(held-out real digits: {scores.frechet_distance_held_out:.2f})",
        f"nearest training digit: {scores.nearest_neighbour:.4f} RMS per pixel "
        f"(held-out real digits: {scores.nearest_neighbour_held_out:.4f}; copies would be at 0)",
    ]
    if scores.alignment_cosine is not None:
        lines.append(f"alignment cosine on held-out images: {scores.alignment_cosine:.3f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> str:
    """Write the scores to RUN/scores.json, of others than ema RUN/scores-WEIGHTS.json.

    Returns them as lines.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run on the digits")
    parser.add_argument("--step", type=int, help="checkpoint; the newest by default")
    parser.add_argument("--weights", default="ema", help="model, ema, ema_2, ...")
    parser.add_argument("--samples", type=int, default=500, dest="count", metavar="SAMPLES")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    which = "" if arguments.weights == "ema" else f"-{arguments.weights}"
    out = arguments.run / f"scores{which}.json"
    expect_writable("run", out)
    if arguments.step is None:
        expect_whole(arguments.run)
    scores = evaluate(**vars(arguments))
    write_whole(out, json.dumps(asdict(scores), indent=2) + "\n")
    return describe(scores)


if __name__ == "__main__":
    sys.exit(command.main(main, sys.argv[1:]))
