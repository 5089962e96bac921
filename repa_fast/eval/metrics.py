"""`repa-fast eval`: how generated images compare with real ones.

Features of images are those of the Inception graph of 2015, with which FID, sFID, the inception
score, precision and recall are published, the mean patch tokens of any encoder, or those of a small
classifier fitted on the dataset. Images are read and encoded batch by batch, on as many processes
as torchrun starts; of each only the features are kept, 8 KB for the Inception's.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from repa_fast.configs.part import expect_at_least
from repa_fast.contracts import expect_writable
from repa_fast.data.dataset import LatentDataset
from repa_fast.data.loader import read_batch
from repa_fast.data.open import Dataset, open_dataset
from repa_fast.distributed import World, progress_bar, session
from repa_fast.eval import reference, scores
from repa_fast.eval.pictures import markdown
from repa_fast.eval.reference import ImageFile, Statistics, newest_images
from repa_fast.eval.spaces import ScoreConfig, feature_space
from repa_fast.eval.statistics import Moments, Rows
from repa_fast.whole import write_whole
from repa_fast.words import note

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""(index int64 (B), images uint8 (B, 3, H, W))."""
REFERENCE_IMAGES = 10_000
"""Images of a reference that is written, for precision and recall."""


@dataclass(kw_only=True)
class EvalConfig(ScoreConfig):
    """`repa-fast eval`: Frechet distances, inception score, precision, recall, KID, MMD."""

    samples: str = ""
    """The .npz of images that `repa-fast generate` writes (arr_0, uint8 (N, H, W, 3)), or a run's
    folder: the newest one in RUN/generated."""
    weights: str = ""
    """Which of a run's images: those of model, ema, ema_2 and so on; of any where empty."""
    num_samples: int = 0
    """Take so many samples, of which fewer in the file are an error; all of them where 0."""
    out: str = ""
    """File to write, FILE.json, and FILE.md beside it; beside the samples where empty."""
    write_reference: str = ""
    """Write such an .npz of the dataset, with Inception features, instead of scoring samples."""


@dataclass
class Measured:
    """A set of images in a feature space.

    Attributes:
        name: of what was measured, with a fingerprint.
        count: images behind the moments; None where a file of them does not say.
        pool, spatial: mean and covariance; the latter for the Inception alone.
        rows: features (N, F) of single images, of a published reference its 10,000, if kept.
        logits: (N, classes) of the same images, if kept: the Inception's, or where there are
            labels.
        labels: int64 (N), the classes that they were asked for, if the features know classes.
    """

    name: str
    count: int | None
    pool: Statistics
    spatial: Statistics | None = None
    rows: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    labels: torch.Tensor | None = None


def evaluate(config: EvalConfig) -> str:
    """Score samples, or write a reference; every process of torchrun calls it.

    Returns:
        A Markdown table, or what was written; empty on processes other than the first.
    """
    if not (config.samples or config.write_reference):
        raise ValueError("samples is empty, expected an .npz of images")
    expect_at_least(config, 0, "num_samples")
    if config.out:
        expect_writable("out", Path(config.out), ".json")
    with session() as world:
        if config.write_reference:
            expect_writable("write_reference", Path(config.write_reference))
            return _write_reference(config, world)
        samples = world.on_first(lambda: newest_images(Path(config.samples), config.weights))
        file = ImageFile(samples, config.num_samples or None)
        scorer = Scorer(config, world)
        out = Path(config.out or samples.with_suffix(f".{scorer.space.name}.json"))
        expect_writable("out", out)
        refused = scorer.refused(file.count)
        if world.is_main:
            tell(refused, "generate more (--num-fid-samples)")
        real, generated = scorer.real, scorer.measure_file(file)
        if not world.is_main:
            return ""
        described = {
            "scores": scorer.compare(generated),
            "refused": refused,
            "features": scorer.space.name,
            "classifier": scorer.space.classifier(),
            "samples": {"name": generated.name, "count": generated.count},
            "reference": {"name": real.name, "count": real.count, "rows": len(real.rows)},
            "settings": asdict(config),
        }
        table = _table(described, str(scorer.space))
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, json.dumps(described, indent=2) + "\n")
        write_whole(out.with_suffix(".md"), table + "\n")
        return table


class Scorer:
    """Measures images in a feature space and compares them with a reference.

    Every process of `world` calls its methods; `shown` is whether there are progress bars.
    """

    def __init__(self, config: ScoreConfig, world: World, *, shown: bool = True) -> None:
        if bool(config.reference) == bool(config.dataset):
            raise ValueError("reference and dataset: expected one of them, to compare with")
        self.config, self.world, self.shown = config, world, shown
        self.space = feature_space(config, world)

    @cached_property
    def real(self) -> Measured:
        """What is compared with, measured at the first use; ValueError where it does not fit."""
        if self.config.dataset:
            return self.measure_dataset(open_dataset(self.config.dataset, self.config.split))
        if not self.space.spatial:
            measured = self.measure_file(ImageFile(self.config.reference))
            return replace(measured, name=f"arr_0 of {measured.name}")
        stored = reference.load(self.config.reference)
        measured = self.measure_file(stored.images)
        return replace(measured, count=None, pool=stored.pool, spatial=stored.spatial)

    @cached_property
    def _real_count(self) -> int | None:
        """As `real.count`, before anything is measured."""
        if self.config.dataset:
            return len(open_dataset(self.config.dataset, self.config.split))
        return None if self.space.spatial else ImageFile(self.config.reference).count

    def refused(self, count: int) -> dict[str, str]:
        """Return the Frechet distances of `count` images that there are not, and why, by name.

        A covariance of rows that are not many more than its width says little of the images. Stored
        moments do not say how many they are of, and are taken at their word.
        """
        found, real = {}, self._real_count
        for name, (_, width) in self.space.distances.items():
            expected = f"expected at least {2 * width} (twice the width {width})"
            if count < 2 * width:
                found[name] = f"{count} images, {expected}"
            elif real is not None and real < 2 * width:
                found[name] = f"{real} real images, {expected}"
        return found

    def measure(
        self,
        name: str,
        batches: Batches,
        count: int,
        *,
        keep: bool = True,
        labels: torch.Tensor | None = None,
    ) -> Measured:
        """Measure `count` images, of which each process has some batches.

        Features of single images, which are large for a whole dataset, are left out unless `keep`.

        Args:
            labels: the classes, int64 (count), that the images were asked for, if known.

        Raises:
            ValueError: an image is missing, features are not finite, or there is no such class.
        """
        world, device, space = self.world, self.world.device, self.space
        labels = labels if space.classes else None
        if labels is not None and not (labels.min() >= 0 and labels.max() < space.classes):
            there = f"{name} has labels {int(labels.min())}..{int(labels.max())}"
            raise ValueError(f"{there}, expected 0..{space.classes - 1}, the dataset's classes")
        moments = {k: Moments(width, device) for k, width in space.distances.values()}
        rows = {"pool": Rows(space.width, device)} if keep else {}
        if keep and (space.spatial or labels is not None):
            rows["logits"] = Rows(space.logits, device)
        with progress_bar(name.split(",")[0], world.is_main and self.shown) as progress:
            advance = progress(count)
            for index, images in batches:
                features = space.features(images.to(device))._asdict()
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
            name,
            moments["pool"].count,
            **found,
            rows=kept.get("pool"),
            logits=kept.get("logits"),
            labels=labels,
        )

    def measure_file(self, file: ImageFile) -> Measured:
        """Measure the images of an .npz."""
        batches = file.batches(self.config.batch_size, self.world.rank, self.world.size)
        labels = file.labels if self.space.classes else None
        return self.measure(file.name, batches, file.count, labels=labels)

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
        config, real, refused = self.config, self.real, self.refused(generated.count)
        found = {
            name: scores.frechet_distance(*getattr(real, kind), *getattr(generated, kind))
            for name, (kind, _) in self.space.distances.items()
            if name not in refused
        }
        if self.space.spatial:
            found["inception score"] = scores.inception_score(generated.logits)
        if generated.labels is not None:
            found["class accuracy"] = scores.class_accuracy(generated.logits, generated.labels)
        rows = real.rows, generated.rows
        found["precision"], found["recall"] = scores.precision_recall(*rows)
        size = min(config.kid_size, *map(len, rows))
        kid = scores.kid(*rows, subsets=config.kid_subsets, size=size, seed=config.seed)
        found[f"KID ({size} images)"], found["KID, deviation"] = kid
        if not self.space.spatial:
            found["MMD"] = scores.mmd_rbf(*(F.normalize(of.double(), dim=1) for of in rows))
        return found


def tell(refused: dict[str, str], more: str) -> None:
    """Say on stderr which scores there will not be, and what to do: `more` makes more images."""
    for name, why in refused.items():
        advice = "take features of a smaller width"
        note(f"{name}: refused, {why}; {'' if 'real images' in why else f'{more}, or '}{advice}")


def _table(described: dict, features: str) -> str:
    """Return the scores as a table, with what they are of."""
    samples, real = described["samples"], described["reference"]
    moments = "stored moments" if real["count"] is None else f"moments of {real['count']} images"
    rows = [(name, f"refused, {why}") for name, why in described["refused"].items()]
    rows += [(name, f"{value:.5g}") for name, value in described["scores"].items()]
    about = (
        f"{samples['count']} samples: {samples['name']}. Reference: {real['name']}, {moments}, "
        f"neighbours among {real['rows']}. Features: {features}; seed "
        f"{described['settings']['seed']}."
    )
    return "\n".join([*markdown(("score", "value"), rows), "", about])


def _write_reference(config: EvalConfig, world: World) -> str:
    if config.features != "inception" or not config.dataset:
        raise ValueError("write_reference needs --dataset and Inception features")
    dataset, scorer = open_dataset(config.dataset, config.split), Scorer(config, world)
    for why in scorer.refused(2 * scorer.space.width).values():
        raise ValueError(f"write_reference: {config.dataset} has {why}")
    measured = scorer.measure_dataset(dataset, keep=False)
    if not world.is_main:
        return ""
    chosen = np.random.default_rng(config.seed).permutation(len(dataset))[:REFERENCE_IMAGES]
    kept = read_batch(dataset, np.sort(chosen))["image"].permute(0, 2, 3, 1).numpy()
    reference.write(
        config.write_reference, images=kept, pool=measured.pool, spatial=measured.spatial
    )
    return f"{config.write_reference}: {measured.count} images, {len(kept)} of them kept"
