"""`repa-fast eval`: how generated images compare with real ones.

Features of images are those of the Inception graph of 2015, with which FID, sFID, the inception
score, precision and recall are published, or the mean patch tokens of any encoder. Images are read
and encoded batch by batch, on as many processes as torchrun starts; of each only the features are
kept, 8 KB for the Inception's.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from repa_fast.contracts import expect_writable
from repa_fast.data.dataset import LatentDataset
from repa_fast.data.loader import read_batch
from repa_fast.data.open import Dataset, open_dataset
from repa_fast.distributed import World, progress_bar, session
from repa_fast.eval import inception, reference, scores
from repa_fast.eval.inception import Features, Inception, mean_patch_tokens
from repa_fast.eval.pictures import markdown
from repa_fast.eval.reference import ImageFile, Statistics
from repa_fast.eval.statistics import Moments, Rows
from repa_fast.whole import write_whole

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""(index int64 (B), images uint8 (B, 3, H, W))."""
REFERENCE_IMAGES = 10_000
"""Images of a reference that is written, for precision and recall."""


@dataclass(kw_only=True)
class ScoreConfig:
    """What images are compared with, and in which features."""

    reference: str = ""
    """An .npz with mu, sigma, mu_s, sigma_s and arr_0, as ADM publishes them ..."""
    dataset: str = ""
    """... or a dataset, whose images are the reference; `digits` for the bundled set."""
    split: str = "train"
    """Of the dataset."""
    features: str = "inception"
    """inception, digits-judge, or an encoder's name as in --enc-type."""
    inception_weights: str = ""
    """File of the Inception's weights; torch's cache or torch-fidelity's release where empty."""
    enc_weights: str = ""
    """File of the encoder's weights; its own source where empty."""
    batch_size: int = 64
    """Images at a time on each process."""
    kid_subsets: int = 100
    """Pairs of random subsets of KID."""
    kid_size: int = 1000
    """Images of each."""
    seed: int = 0
    """Of those subsets."""


@dataclass(kw_only=True)
class EvalConfig(ScoreConfig):
    """`repa-fast eval`: Frechet distances, inception score, precision, recall, KID, MMD."""

    samples: str = ""
    """The .npz of images that `repa-fast generate` writes (arr_0, uint8 (N, H, W, 3))."""
    num_samples: int = 50_000
    """Take so many samples; fewer in the file are an error."""
    out: str = ""
    """File to write, FILE.json, and FILE.md beside it; beside the samples where empty."""
    write_reference: str = ""
    """Write such an .npz of the dataset, with Inception features, instead of scoring samples."""


class Space(NamedTuple):
    """A feature space: name for tables, width of `pool`, features of uint8 images (B, 3, H, W)."""

    name: str
    width: int
    features: Callable[[torch.Tensor], Features]


@dataclass
class Measured:
    """A set of images in a feature space.

    Attributes:
        name: of what was measured, with a fingerprint.
        count: images behind the moments; None where a file of them does not say.
        pool, spatial: mean and covariance; the latter for the Inception alone.
        rows: features (N, F) of single images, of a published reference its 10,000, if kept.
        logits: (N, 1008) of the same images, for the Inception alone.
    """

    name: str
    count: int | None
    pool: Statistics
    spatial: Statistics | None = None
    rows: torch.Tensor | None = None
    logits: torch.Tensor | None = None


def evaluate(config: EvalConfig) -> str:
    """Score samples, or write a reference; every process of torchrun calls it.

    Returns:
        A Markdown table, or what was written; empty on processes other than the first.
    """
    if not (config.samples or config.write_reference):
        raise ValueError("samples is empty, expected an .npz of images")
    if config.out:
        expect_writable("out", Path(config.out), ".json")
    with session() as world:
        if config.write_reference:
            expect_writable("write_reference", Path(config.write_reference))
            return _write_reference(config, world)
        file = ImageFile(config.samples, config.num_samples)
        scorer = Scorer(config, world)
        out = Path(config.out or Path(config.samples).with_suffix(f".{scorer.space.name}.json"))
        expect_writable("out", out)
        real, generated = scorer.real, scorer.measure_file(file)
        if not world.is_main:
            return ""
        described = {
            "scores": scorer.compare(generated),
            "features": scorer.space.name,
            "samples": {"name": generated.name, "count": generated.count},
            "reference": {"name": real.name, "count": real.count, "rows": len(real.rows)},
            "settings": asdict(config),
        }
        table = _table(described)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, json.dumps(described, indent=2) + "\n")
        write_whole(out.with_suffix(".md"), table + "\n")
        return table


def feature_space(config: ScoreConfig, device: torch.device) -> Space:
    """Return the features that `config.features` names, on `device`."""
    if config.features == "inception":
        network = Inception(config.inception_weights, device)
        return Space("inception", inception.POOL_WIDTH, network)
    if config.features == "digits-judge":
        from repa_fast.encoders.digits import WIDTH, DigitsJudge

        features = torch.no_grad()(DigitsJudge().to(device).features)
        return Space("digits-judge", WIDTH, lambda images: Features(features(images)))
    from repa_fast import encoders

    spec = encoders.spec(config.features)
    if config.dataset:
        resolution = open_dataset(config.dataset, config.split).metadata.resolution
    else:
        resolution = ImageFile(config.reference).height
    encoder = encoders.load(spec.name, resolution, device, config.enc_weights)
    return Space(spec.name, spec.width, lambda images: Features(mean_patch_tokens(encoder, images)))


class Scorer:
    """Measures images in a feature space and compares them with a reference.

    Every process of `world` calls its methods; `shown` is whether there are progress bars.
    """

    def __init__(self, config: ScoreConfig, world: World, *, shown: bool = True) -> None:
        if bool(config.reference) == bool(config.dataset):
            raise ValueError("reference and dataset: expected one of them, to compare with")
        self.config, self.world, self.shown = config, world, shown
        self.space = feature_space(config, world.device)

    @cached_property
    def real(self) -> Measured:
        """What is compared with, measured at the first use; ValueError where it does not fit."""
        if self.config.dataset:
            return self.measure_dataset(open_dataset(self.config.dataset, self.config.split))
        if self.space.name != "inception":
            measured = self.measure_file(ImageFile(self.config.reference))
            return replace(measured, name=f"arr_0 of {measured.name}")
        stored = reference.load(self.config.reference)
        measured = self.measure_file(stored.images)
        return replace(measured, count=None, pool=stored.pool, spatial=stored.spatial)

    def measure(self, name: str, batches: Batches, count: int, *, keep: bool = True) -> Measured:
        """Measure `count` images, of which each process has some batches.

        Features of single images, which are large for a whole dataset, are left out unless `keep`.

        Raises:
            ValueError: an image is missing, or features are not finite.
        """
        world, device, widths = self.world, self.world.device, {"pool": self.space.width}
        if self.space.name == "inception":
            widths |= {"spatial": inception.SPATIAL_WIDTH, "logits": inception.CLASSES}
        moments = {k: Moments(width, device) for k, width in widths.items() if k != "logits"}
        rows = {k: Rows(width, device) for k, width in widths.items() if keep and k != "spatial"}
        with progress_bar(name.split(",")[0], world.is_main and self.shown) as progress:
            advance = progress(count)
            for index, images in batches:
                features = self.space.features(images.to(device))._asdict()
                for kind, of in moments.items():
                    of.update(features[kind])
                for kind, of in rows.items():
                    of.add(index, features[kind])
                advance(min(int(index[-1]) + 1, count))
        for of in moments.values():
            of.reduce(world)
        found = {kind: of.statistics(count) for kind, of in moments.items()}
        kept = {kind: of.gather(count, world) for kind, of in rows.items()}
        return Measured(
            name, moments["pool"].count, **found, rows=kept.get("pool"), logits=kept.get("logits")
        )

    def measure_file(self, file: ImageFile) -> Measured:
        """Measure the images of an .npz."""
        batches = file.batches(self.config.batch_size, self.world.rank, self.world.size)
        return self.measure(file.name, batches, file.count)

    def measure_dataset(self, dataset: Dataset, *, keep: bool = True) -> Measured:
        """Measure all images; each process takes every world.size-th batch of consecutive rows."""
        size, world = self.config.batch_size, self.world

        def batches() -> Batches:
            for start in range(world.rank * size, len(dataset), world.size * size):
                batch = read_batch(dataset, np.arange(start, min(start + size, len(dataset))))
                yield batch["index"], batch["image"]

        version = f", version {dataset.table.version}" if isinstance(dataset, LatentDataset) else ""
        name = f"{Path(dataset.uri).parent.name}/{Path(dataset.uri).name}{version}"
        return self.measure(name, batches(), len(dataset), keep=keep)

    def compare(self, generated: Measured) -> dict[str, float]:
        """Return every score that the features allow, by name."""
        config, real = self.config, self.real
        is_inception = generated.spatial is not None
        distance = scores.frechet_distance(*real.pool, *generated.pool)
        found = {"FID" if is_inception else "Frechet distance": distance}
        if is_inception:
            found["sFID"] = scores.frechet_distance(*real.spatial, *generated.spatial)
            found["inception score"] = scores.inception_score(generated.logits)
        rows = real.rows, generated.rows
        found["precision"], found["recall"] = scores.precision_recall(*rows)
        size = min(config.kid_size, *map(len, rows))
        kid = scores.kid(*rows, subsets=config.kid_subsets, size=size, seed=config.seed)
        found[f"KID ({size} images)"], found["KID, deviation"] = kid
        if not is_inception:
            found["MMD"] = scores.mmd_rbf(*(F.normalize(of.double(), dim=1) for of in rows))
        return found


def _table(described: dict) -> str:
    """Return the scores as a table, with what they are of."""
    samples, real = described["samples"], described["reference"]
    moments = "stored moments" if real["count"] is None else f"moments of {real['count']} images"
    rows = [(name, f"{value:.5g}") for name, value in described["scores"].items()]
    about = (
        f"{samples['count']} samples: {samples['name']}. Reference: {real['name']}, {moments}, "
        f"neighbours among {real['rows']}. Features: {described['features']}; seed "
        f"{described['settings']['seed']}."
    )
    return "\n".join([*markdown(("score", "value"), rows), "", about])


def _write_reference(config: EvalConfig, world: World) -> str:
    if config.features != "inception" or not config.dataset:
        raise ValueError("write_reference needs --dataset and Inception features")
    dataset = open_dataset(config.dataset, config.split)
    measured = Scorer(config, world).measure_dataset(dataset, keep=False)
    if not world.is_main:
        return ""
    chosen = np.random.default_rng(config.seed).permutation(len(dataset))[:REFERENCE_IMAGES]
    kept = read_batch(dataset, np.sort(chosen))["image"].permute(0, 2, 3, 1).numpy()
    reference.write(
        config.write_reference, images=kept, pool=measured.pool, spatial=measured.spatial
    )
    return f"{config.write_reference}: {measured.count} images, {len(kept)} of them kept"
