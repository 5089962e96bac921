"""`repa-fast eval`: how generated images compare with real ones.

Features of images are those of the Inception graph of 2015, with which FID, sFID, the inception
score, precision and recall are published, or the mean patch tokens of any encoder. Images are read
and encoded batch by batch, on as many processes as torchrun starts; of each only the features are
kept, 8 KB for the Inception's.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from repa_fast.data.dataset import LatentDataset
from repa_fast.data.loader import read_batch
from repa_fast.data.open import Dataset, open_dataset
from repa_fast.data.processes import progress_bar
from repa_fast.distributed import World, session
from repa_fast.eval import reference, scores
from repa_fast.eval.fid import frechet_distance
from repa_fast.eval.inception import (
    CLASSES,
    POOL_WIDTH,
    SPATIAL_WIDTH,
    Inception,
    mean_patch_tokens,
)
from repa_fast.eval.statistics import Moments, Rows
from repa_fast.ledger import write_whole

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""(index int64 (B), images uint8 (B, 3, H, W))."""
REFERENCE_IMAGES = 10_000
"""Images of a reference that is written, for precision and recall."""


@dataclass(kw_only=True)
class EvalConfig:
    """`repa-fast eval`: Frechet distances, inception score, precision, recall, KID, MMD."""

    samples: str = ""
    """The .npz of images that `repa-fast generate` writes (arr_0, uint8 (N, H, W, 3))."""
    reference: str = ""
    """An .npz with mu, sigma, mu_s, sigma_s and arr_0, as ADM publishes them ..."""
    dataset: str = ""
    """... or a dataset, whose images are the reference; `digits` for the bundled set."""
    split: str = "train"
    """Of the dataset."""
    num_samples: int = 50_000
    """Take so many samples; fewer in the file are an error."""
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
    out: str = ""
    """File to write, FILE.json, and FILE.md beside it; beside the samples where empty."""
    write_reference: str = ""
    """Write such an .npz of the dataset, with Inception features, instead of judging samples."""


class Space(NamedTuple):
    """A feature space.

    Attributes:
        name: for tables.
        width: of `features`' first result.
        features: uint8 (B, 3, H, W) -> (features (B, width), sFID's and logits or None).
    """

    name: str
    width: int
    features: Callable[
        [torch.Tensor], tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
    ]


@dataclass
class Measured:
    """A set of images in a feature space.

    Attributes:
        name: of what was measured, with a fingerprint.
        count: images behind the moments; None where a file of them does not say.
        pool, spatial: mean and covariance; the latter for the Inception alone.
        rows: features (N, F) of single images, of a published reference its 10,000.
        logits: (N, 1008), for the Inception alone.
    """

    name: str
    count: int | None
    pool: tuple[np.ndarray, np.ndarray]
    spatial: tuple[np.ndarray, np.ndarray] | None
    rows: torch.Tensor
    logits: torch.Tensor | None


def evaluate(config: EvalConfig) -> str:
    """Judge samples, or write a reference; every process of torchrun calls it.

    Returns:
        A Markdown table, or what was written; empty on processes other than the first.

    Raises:
        ValueError: files that do not fit, or fewer samples than asked for.
        RuntimeError: weights cannot be had.
    """
    if bool(config.reference) == bool(config.dataset):
        raise ValueError("reference and dataset: expected one of them, to compare with")
    if not (config.samples or config.write_reference):
        raise ValueError("samples is empty, expected an .npz of images")
    if config.out and Path(config.out).suffix != ".json":
        raise ValueError(f"out is {config.out}, expected the name of a .json file")
    with session() as world:
        if config.write_reference:
            return _write_reference(config, world)
        file = reference.ImageFile(config.samples, config.num_samples)
        space = feature_space(config, world.device)
        real = measured_reference(config, space, world)
        batches = file.batches(config.batch_size, world.rank, world.size)
        name = f"{file.path.name}, sha256 {reference.fingerprint(file.path)}"
        generated = measure(name, batches, file.count, space, world)
        if not world.is_main:
            return ""
        results = compare(real, generated, config)
        described = {
            "scores": results,
            "features": space.name,
            "samples": {"name": generated.name, "count": generated.count},
            "reference": {"name": real.name, "count": real.count, "rows": len(real.rows)},
            "settings": asdict(config),
        }
        table = markdown(described)
        out = Path(config.out or Path(config.samples).with_suffix(f".{space.name}.json"))
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, json.dumps(described, indent=2) + "\n")
        write_whole(out.with_suffix(".md"), table + "\n")
        return table


def feature_space(config: EvalConfig, device: torch.device) -> Space:
    """The features that `config.features` names, on `device`.

    Raises:
        ValueError: an unknown name, or a wrong file of weights.
        RuntimeError: the weights cannot be had.
    """
    if config.features == "inception":
        inception = Inception(config.inception_weights, device)
        return Space("inception", POOL_WIDTH, lambda images: tuple(inception(images)))
    if config.features == "digits-judge":
        from repa_fast.encoders.digits import WIDTH, DigitsJudge

        judge = DigitsJudge().to(device)
        with_grad_off = torch.no_grad()(judge.features)
        return Space("digits-judge", WIDTH, lambda images: (with_grad_off(images), None, None))
    from repa_fast import encoders

    spec, resolution = encoders.spec(config.features), _resolution(config)
    encoder = encoders.load(spec.name, resolution, device, config.enc_weights)
    return Space(
        spec.name, spec.width, lambda images: (mean_patch_tokens(encoder, images), None, None)
    )


def _resolution(config: EvalConfig) -> int:
    if config.dataset:
        return _open(config).metadata.resolution
    return reference.ImageFile(config.reference).height


def measure(
    name: str, batches: Batches, count: int, space: Space, world: World, *, shown: bool = True
) -> Measured:
    """The features of `count` images, of which each process has some batches; all call it.

    `shown`: with a progress bar.

    Raises:
        ValueError: an image is missing, or features are not finite.
    """
    device = world.device
    pool, rows = Moments(space.width, device), Rows(space.width, device)
    spatial, logits = Moments(SPATIAL_WIDTH, device), Rows(CLASSES, device)
    with progress_bar(name.split(",")[0], world.is_main and shown) as progress:
        advance = progress(count)
        for index, images in batches:
            features, of_space, of_classes = space.features(images.to(device))
            pool.update(features)
            rows.add(index, features)
            if of_space is not None:
                spatial.update(of_space)
                logits.add(index, of_classes)
            advance(min(int(index[-1]) + 1, count))
    pool.reduce(world)
    spatial.reduce(world)
    has_more = spatial.count > 0
    return Measured(
        name=name,
        count=pool.count,
        pool=pool.statistics(count),
        spatial=spatial.statistics(count) if has_more else None,
        rows=rows.gather(count, world),
        logits=logits.gather(count, world) if has_more else None,
    )


def measured_reference(
    config: EvalConfig, space: Space, world: World, *, shown: bool = True
) -> Measured:
    """What `config` compares with; every process calls it.

    Raises:
        ValueError: it cannot be read, or does not fit.
    """
    if config.dataset:
        dataset = _open(config)
        batches = dataset_batches(dataset, config.batch_size, world)
        return measure(_named(dataset), batches, len(dataset), space, world, shown=shown)
    if space.name != "inception":
        file = reference.ImageFile(config.reference)
        batches = file.batches(config.batch_size, world.rank, world.size)
        name = f"arr_0 of {file.path.name}, sha256 {reference.fingerprint(file.path)}"
        return measure(name, batches, file.count, space, world, shown=shown)
    stored = reference.load(config.reference)
    batches = stored.images.batches(config.batch_size, world.rank, world.size)
    name = f"{stored.path.name}, sha256 {stored.sha256}"
    measured = measure(name, batches, stored.images.count, space, world, shown=shown)
    return replace(measured, count=None, pool=stored.pool, spatial=stored.spatial)


def dataset_batches(dataset: Dataset, size: int, world: World) -> Batches:
    """Every world.size-th batch of consecutive rows, for this process."""
    for start in range(world.rank * size, len(dataset), world.size * size):
        batch = read_batch(dataset, np.arange(start, min(start + size, len(dataset))))
        yield batch["index"], batch["image"]


def _open(config: EvalConfig) -> Dataset:
    if config.dataset != "digits":
        return open_dataset(config.dataset, config.split)
    from repa_fast.prepare.images import DIGITS_DIR, ensure_digits

    return open_dataset(ensure_digits() or DIGITS_DIR, config.split)


def _named(dataset: Dataset) -> str:
    version = f", version {dataset.table.version}" if isinstance(dataset, LatentDataset) else ""
    return f"{Path(dataset.uri).parent.name}/{Path(dataset.uri).name}{version}"


def compare(real: Measured, generated: Measured, config: EvalConfig) -> dict[str, float]:
    """Every score that the features allow, by name."""
    found = {}
    distance = frechet_distance(*real.pool, *generated.pool)
    if generated.spatial is not None:
        found["FID"] = distance
        found["sFID"] = frechet_distance(*real.spatial, *generated.spatial)
        found["inception score"] = scores.inception_score(generated.logits)
    else:
        found["Frechet distance"] = distance
    precision, recall = scores.precision_recall(real.rows, generated.rows)
    found |= {"precision": precision, "recall": recall}
    size = min(config.kid_size, len(real.rows), len(generated.rows))
    mean, deviation = scores.kid(
        real.rows, generated.rows, subsets=config.kid_subsets, size=size, seed=config.seed
    )
    found |= {f"KID ({size} images)": mean, "KID, deviation": deviation}
    if generated.spatial is None:
        found["MMD"] = scores.mmd_rbf(_unit(real.rows), _unit(generated.rows))
    return found


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows.double(), dim=1)


def markdown(described: dict) -> str:
    """The scores as a table, with what they are of."""
    samples, real = described["samples"], described["reference"]
    moments = "stored moments" if real["count"] is None else f"moments of {real['count']} images"
    lines = ["| score | value |", "|---|---|"]
    lines += [f"| {name} | {value:.5g} |" for name, value in described["scores"].items()]
    return "\n".join(
        [
            *lines,
            "",
            f"{samples['count']} samples: {samples['name']}. Reference: {real['name']}, {moments}, "
            f"neighbours among {real['rows']}. Features: {described['features']}; seed "
            f"{described['settings']['seed']}.",
        ]
    )


def _write_reference(config: EvalConfig, world: World) -> str:
    if config.features != "inception" or not config.dataset:
        raise ValueError("write_reference needs --dataset and Inception features")
    dataset = _open(config)
    inception = Inception(config.inception_weights, world.device)
    images = (images for _, images in dataset_batches(dataset, config.batch_size, world))
    pool, spatial = reference.measure(images, inception)
    pool.reduce(world)
    spatial.reduce(world)
    if not world.is_main:
        return ""
    chosen = np.random.default_rng(config.seed).permutation(len(dataset))[:REFERENCE_IMAGES]
    kept = read_batch(dataset, np.sort(chosen))["image"].permute(0, 2, 3, 1).numpy()
    reference.write(config.write_reference, images=kept, pool=pool, spatial=spatial)
    return f"{config.write_reference}: {pool.count} images, {len(kept)} of them kept"
