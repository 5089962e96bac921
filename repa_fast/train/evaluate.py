"""Scores of the moving average while it is trained: `--eval-every`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from repa_fast import ops
from repa_fast.eval.load import Loaded
from repa_fast.eval.metrics import (
    EvalConfig,
    Measured,
    compare,
    feature_space,
    measure,
    measured_reference,
)
from repa_fast.eval.sampling import ImageSampler, SamplerConfig, labels_of
from repa_fast.models.sit import SiT
from repa_fast.prepare.images import DIGITS_DIR
from repa_fast.train.state import TrainState, configure_backends

BATCH = 64
"""Images at a time on each process."""


class Evaluator:
    """Judges the moving average's samples; the sampler's settings are those of the sample grids.

    Every process makes its share of the images. What is compared with is measured at the first
    evaluation and kept. Attention is torch's own, as in an evaluation of a checkpoint: the run's
    backend was chosen for its dtype, and an fp16 run is sampled in fp32.

    Raises:
        ValueError: the features are not known, or there is no reference.
        RuntimeError: their weights cannot be had.
    """

    def __init__(self, state: TrainState) -> None:
        config = state.config
        dataset = str(DIGITS_DIR) if config.data_dir == "digits" else config.data_dir
        self._config = EvalConfig(
            reference=config.eval_reference,
            dataset="" if config.eval_reference else dataset,
            features=config.eval_features,
            inception_weights=config.eval_weights if config.eval_features == "inception" else "",
            enc_weights=config.eval_weights if config.eval_features != "inception" else "",
            seed=config.seed,
        )
        self._space = feature_space(self._config, state.world.device)
        self._real: Measured | None = None

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Every score by its name; all processes call it."""
        if self._real is None:
            self._real = measured_reference(self._config, self._space, state.world, shown=False)
        count = state.config.eval_samples
        average = state.whole_average(everywhere=True)
        try:
            batches = self._batches(state, average, count)
            with ops.use_attention_backend("sdpa"):
                generated = measure(
                    f"step {state.step}", batches, count, self._space, state.world, shown=False
                )
        finally:
            configure_backends(state.config)
        return compare(self._real, generated, self._config)

    def _batches(
        self, state: TrainState, average: SiT, count: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        config, world = state.config, state.world
        sampler = ImageSampler(
            Loaded(
                model=average,
                metadata=state.metadata,
                path_type=config.path_type,
                prediction=config.prediction,
                name=config.exp_name,
                step=state.step,
                digest="",
                source=Path(),
                objective=config.objective,
            ),
            SamplerConfig(
                mode=config.mode,
                num_steps=config.num_steps,
                cfg_scale=config.cfg_scale,
                mixed_precision="bf16" if state.autocast_dtype is torch.bfloat16 else "no",
                tf32=config.allow_tf32,
                vae_path=config.vae_path,
            ),
            world.device,
        )
        for start in range(world.rank * BATCH, count, world.size * BATCH):
            index = np.arange(start, start + BATCH)
            labels = labels_of(index, len(state.metadata.class_names), config.seed, "balanced")
            images = sampler.images(index, labels, config.seed)
            kept = min(BATCH, count - start)
            yield torch.arange(start, start + kept), images[:kept]
