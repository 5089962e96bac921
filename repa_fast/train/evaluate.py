"""Samples of the EMA while it is trained: grids to look at, and scores with `--eval-every`."""

import math
from collections.abc import Callable

import numpy as np
import torch

from repa_fast import ops
from repa_fast.configs.evaluate import EvaluateConfig
from repa_fast.data import latents
from repa_fast.data.loader import read_batch
from repa_fast.data.open import open_dataset
from repa_fast.diffusion.draws import stream
from repa_fast.eval import reference
from repa_fast.eval.load import Trained
from repa_fast.eval.metrics import Batches, Scorer, tell
from repa_fast.eval.pictures import arrange, squarest
from repa_fast.eval.reference import ImageFile
from repa_fast.eval.sampling import ImageSampler, labels_of
from repa_fast.eval.spaces import ScoreConfig
from repa_fast.models.sit import SiT
from repa_fast.train.state import TrainState, configure_backends

GRID_IMAGES = 100
LEAST_IMAGES = 4
"""What precision and recall need: an image and three neighbours."""
BATCH = 64
"""Images at a time on each process."""


def can_sample(state: TrainState, warn: Callable[[str], None]) -> bool:
    """Return whether there can be sample grids, for which latents need their autoencoder.

    It is loaded here. The first time that fails, `warn` gets one line; training goes on.
    """
    vae = state.vae
    if vae is not None and not vae.unavailable:
        try:
            vae.load(state.metadata)
        except (RuntimeError, ValueError) as error:
            warn(f"warning: no sample grids in this run: {error}")
    return vae is None or not vae.unavailable


def sample_grid(state: TrainState, average: SiT) -> np.ndarray:
    """Return samples, uint8 (H, W, 3), of the same noise and labels at every step.

    `average` is the state's EMA, whole. Where there are at most ten classes each has as many
    neighbouring columns, so that the grid is nearly square; otherwise they are spread evenly.
    """
    config, device = state.config, state.world.device
    classes, side = len(state.metadata.class_names), math.isqrt(GRID_IMAGES)
    options = range(classes, GRID_IMAGES + 1, classes) if classes <= side else [side]
    columns = squarest(options, GRID_IMAGES)
    count = GRID_IMAGES // columns * columns
    index = torch.arange(count, device=device)
    labels = index * classes // count if classes > side else index % columns * classes // columns
    generator = stream(config.seed, 0, device=device)
    noise = torch.randn((count, *state.metadata.latent_shape), generator=generator, device=device)
    with state.autocast():
        samples = state.objective.sample(average, noise, labels, config.sampler(), seed=config.seed)
    return arrange(latents.to_pixels(samples, state.metadata, state.vae), columns)


class Evaluator:
    """Evaluates the EMA's samples; the sampler's settings are those of the sample grids.

    Every process makes its share of the images. What is compared with is measured at the first
    evaluation and kept. Attention is torch's own, as in an evaluation of a checkpoint: the run's
    backend was chosen for its dtype, and an fp16 run is sampled in fp32.

    A Frechet distance of too few images is left out, which is said on stderr.

    Raises:
        ValueError: the features are not known, there is no reference, or too few images.
        Failure: weights of the features, or the autoencoder, cannot be had.
    """

    def __init__(self, state: TrainState) -> None:
        config = state.config
        weights = "inception_weights" if config.eval_features == "inception" else "enc_weights"
        scored = ScoreConfig(
            reference=config.eval_reference,
            dataset="" if config.eval_reference else config.data_dir,
            features=config.eval_features,
            seed=config.seed,
            **{weights: config.eval_weights},
        )
        self._scorer = Scorer(scored, state.world, shown=False)
        self._expect_images(config)
        if state.world.is_main:
            tell(self._scorer.refused(config.eval_samples), "raise --eval-samples")
        if state.vae is not None:
            state.vae.load(state.metadata)

    def _expect_images(self, config: EvaluateConfig) -> None:
        """Find out before the first step what the first evaluation would stumble over."""
        if not config.eval_reference:
            dataset = open_dataset(config.data_dir)
            read_batch(dataset, np.array([0]))
            count = len(dataset)
        elif self._scorer.space.spatial:
            count = reference.load(config.eval_reference).images.count
        else:
            count = ImageFile(config.eval_reference).count
        for name, images in (("the reference", count), ("--eval-samples", config.eval_samples)):
            if images < LEAST_IMAGES:
                raise ValueError(f"{name}: {images} images, expected at least {LEAST_IMAGES}")

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Return every score by its name; all processes call it."""
        average, count = state.whole_average(everywhere=True), state.config.eval_samples
        labels = torch.from_numpy(asked_labels(state, np.arange(count)))
        try:
            with ops.use_attention_backend("sdpa"):
                batches, name = own_batches(state, average), f"step {state.step}"
                generated = self._scorer.measure(name, batches, count, labels=labels)
        finally:
            configure_backends(state.config)
        return self._scorer.compare(generated)


def asked_labels(state: TrainState, index: np.ndarray) -> np.ndarray:
    """Return the classes, int64 (B), of the images to evaluate by their numbers (B)."""
    return labels_of(index, len(state.metadata.class_names), state.config.seed, "balanced")


def own_batches(state: TrainState, average: SiT) -> Batches:
    """Yield this process's share of the images to evaluate, BATCH at a time."""
    config, world, count = state.config, state.world, state.config.eval_samples
    settings = config.sampler(
        mixed_precision="bf16" if state.autocast_dtype is torch.bfloat16 else "no",
        tf32=config.allow_tf32,
        vae=config.vae,
    )
    trained = Trained(model=average, metadata=state.metadata, objective=state.objective)
    sampler = ImageSampler(trained, settings, world.device)
    for start in range(world.rank * BATCH, count, world.size * BATCH):
        index = np.arange(start, start + BATCH)
        images = sampler.images(index, asked_labels(state, index), config.seed)
        kept = min(BATCH, count - start)
        yield torch.arange(start, start + kept), images[:kept]
