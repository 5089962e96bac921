"""What is measured of sampling: models with random weights, and ways to sample them."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness.timing import Marks
from benchmarks.sample import rival as sample_rival
from repa_fast.configs import presets
from repa_fast.configs.build import model_arguments
from repa_fast.configs.objective import ObjectiveConfig
from repa_fast.configs.sampler import SamplerConfig
from repa_fast.data.dataset import Metadata
from repa_fast.data.digits import digits_metadata
from repa_fast.data.official import SD_VAE_SCALE
from repa_fast.diffusion.samplers import sde_times
from repa_fast.eval.load import Loaded
from repa_fast.eval.sampling import ImageSampler, labels_of
from repa_fast.models.sit import SiT, size
from repa_fast.objective import build_objective

SEED = 0
GUIDANCES = {
    "1.8 on [0, 1]": {"cfg_scale": 1.8, "guidance_low": 0.0, "guidance_high": 1.0},
    "1.8 on [0, 0.7]": {"cfg_scale": 1.8, "guidance_low": 0.0, "guidance_high": 0.7},
    "none": {"cfg_scale": 1.0, "guidance_low": 0.0, "guidance_high": 1.0},
}
MEASURED = GUIDANCES["1.8 on [0, 0.7]"]
PROVIDERS = {
    "ours-compile-bf16": {"mixed_precision": "bf16", "compile": True},
    "official": None,
    "ours-eager-bf16": {"mixed_precision": "bf16"},
    "ours-compile-tf32": {"compile": True},
    "ours-eager-tf32": {},
}
"""Name -> settings of ImageSampler; None is the rival."""
TOY_PROVIDERS = ("official", "ours-eager-tf32", "ours-compile-tf32")


def build(model: str, toy: bool, device: torch.device) -> Loaded:
    """Build a model with random weights, always the same, that predicts something of unit size."""
    torch.manual_seed(SEED)
    arguments = size("SiT-S/2" if toy else model)
    # "none" as autoencoder: latents alone are sampled, decoding is measured apart
    given = {"scale": SD_VAE_SCALE, "bias": 0.0, "class_names": tuple(map(str, range(1000)))}
    metadata = Metadata(resolution=256, latent_shape=(4, 32, 32), vae="none", **given)
    if toy:
        metadata = digits_metadata()
        arguments = model_arguments(presets.get("digits"), metadata)
    with device:
        sit = SiT(**arguments | {"z_dims": ()})
    for name, parameter in sit.named_parameters():
        if "adaLN" in name or name.startswith("final_layer"):  # zero at initialisation
            torch.nn.init.normal_(parameter, std=sit.pos_embed.shape[-1] ** -0.5)
        elif "embedding_table" in name:
            torch.nn.init.normal_(parameter)
    return Loaded(
        model=sit.eval().requires_grad_(False),
        metadata=metadata,
        objective=build_objective(ObjectiveConfig()),
        name="digits" if toy else model,
        step=None,
        weights="",
        digest="random",
        source=Path(),
    )


class Marked:
    """A model that notes when it is called, and with how many samples."""

    def __init__(self, model: SiT, device: torch.device) -> None:
        self.model, self.num_classes = model, model.num_classes
        self.marks, self.samples = Marks(device), []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor):
        self.marks.mark()
        self.samples.append(len(x))
        return self.model(x, t, y)

    def steps(self) -> list[tuple[float, int]]:
        """Return (milliseconds, samples) of every call, the last one until now; forget them."""
        self.marks.mark()
        samples, self.samples = self.samples, []
        return list(zip(self.marks.milliseconds(), samples))


class Provider:
    """One way to sample a batch."""

    def __init__(self, name: str, loaded: Loaded, batch: int, device: torch.device) -> None:
        self.name, self.batch, self.device = name, batch, device
        settings = PROVIDERS[name]
        self.official = settings is None
        config = SamplerConfig(mode="sde", **(settings or {}))
        self.precision = config.mixed_precision
        self.sampler = ImageSampler(loaded, config, device)
        self.model = self.sampler.model = Marked(loaded.model, device)
        self.index = np.arange(batch)
        self.labels = labels_of(self.index, loaded.model.num_classes, SEED, "random")

    def latents(self, num_steps: int, increments: torch.Tensor | None = None) -> torch.Tensor:
        """Sample (B, C, h, w), fp64; only the rival has to be given the increments."""
        if not self.official:
            config = dataclasses.replace(self.sampler.config, num_steps=num_steps, **MEASURED)
            self.sampler.config = config
            return self.sampler.latents(self.index, self.labels, SEED)
        labels = torch.from_numpy(self.labels).to(self.device)
        noise = self.sampler.noise(self.index, SEED)
        return sample_rival.sample(
            self.model, noise, labels, num_steps=num_steps, increments=increments, **MEASURED
        )

    def run(self, num_steps: int) -> tuple[dict[bool, list[float]], float]:
        """Return ({with guidance: milliseconds of each such step}, wall clock over their sum)."""
        self.model.steps()  # of runs that failed
        started = time.perf_counter()
        self.latents(num_steps)
        steps = self.model.steps()
        wall = 1e3 * (time.perf_counter() - started)
        times = {
            guided: [ms for ms, samples in steps if (samples > self.batch) == guided]
            for guided in (False, True)
        }
        return times, wall / sum(ms for ms, _ in steps)


def evaluations(num_steps: int, guidance: dict[str, float]) -> tuple[int, int]:
    """Return how many of a sampling's evaluations are without and with guidance."""
    times = sde_times(num_steps).tolist()[:-1]
    low, high = guidance["guidance_low"], guidance["guidance_high"]
    guided = sum(low <= t <= high for t in times) if guidance["cfg_scale"] > 1 else 0
    return num_steps - guided, guided
