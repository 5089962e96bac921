"""What images are compared in: the features that --features names."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from repa_fast import encoders
from repa_fast.contracts import expect_choice
from repa_fast.data.digits import digits_metadata
from repa_fast.data.open import open_dataset
from repa_fast.distributed import World
from repa_fast.encoders.registry import REGISTRY
from repa_fast.eval import fitted, inception
from repa_fast.eval.fitted import HeldOut
from repa_fast.eval.inception import Features, Inception, mean_patch_tokens
from repa_fast.eval.reference import ImageFile


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
    """inception; fitted, a classifier that is fitted on DATASET's rows at once; digits-judge; or an
    encoder's name as in --enc-type."""
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
    """Of those subsets, and of what is fitted."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """A feature space.

    Attributes:
        name: for tables.
        features: of uint8 images (B, 3, H, W).
        width, spatial, logits: widths of what `features` gives; only the Inception has `spatial`.
        classes: of the dataset's, whose logits these are; 0 where they are none, or others'.
        held_out: how good they are on real images, where that is known.
        note: what else a table has to say.
    """

    name: str
    features: Callable[[torch.Tensor], Features]
    width: int
    spatial: int = 0
    logits: int = 0
    classes: int = 0
    held_out: HeldOut | None = None
    note: str = ""

    @property
    def distances(self) -> dict[str, tuple[str, int]]:
        """Frechet distances by their names: which features they are of, and the width of these."""
        if self.spatial:
            return {"FID": ("pool", self.width), "sFID": ("spatial", self.spatial)}
        return {"Frechet distance": ("pool", self.width)}

    def classifier(self) -> dict | None:
        """Return what is known of the classifier of the dataset's classes, by name."""
        held_out = self.held_out._asdict() if self.held_out else {}
        return {"classes": self.classes, **held_out} if self.classes else None

    def __str__(self) -> str:
        chance = f"class accuracy by chance {1 / self.classes:.3g}" if self.classes else ""
        held_out = str(self.held_out) if self.held_out else ""
        return "; ".join(filter(None, (self.name, self.note, held_out, chance)))


def feature_space(config: ScoreConfig, world: World) -> Space:
    """Return the features that `config.features` names, on the device of every process.

    Raises:
        ValueError: there are no such features, or the dataset, the reference or a file of weights
            does not fit them.
        Failure: weights can be neither found nor fetched.
    """
    kinds = {"inception": _inception, "fitted": _fitted, "digits-judge": _judge}
    expect_choice("features", config.features, (*kinds, *REGISTRY))
    return kinds.get(config.features, _encoder)(config, world)


def _inception(config: ScoreConfig, world: World) -> Space:
    return Space(
        name="inception",
        features=Inception(config.inception_weights, world.device),
        width=inception.POOL_WIDTH,
        spatial=inception.SPATIAL_WIDTH,
        logits=inception.CLASSES,
    )


def _fitted(config: ScoreConfig, world: World) -> Space:
    if config.enc_weights:
        raise ValueError(f"enc_weights is {config.enc_weights}, expected none: it is fitted here")
    if not config.dataset:
        raise ValueError(
            f"features is fitted, expected a dataset to fit on, got only the images of "
            f"{config.reference}"
        )
    dataset = open_dataset(config.dataset, config.split)
    classifier, held_out = fitted.fit(dataset, config.seed, world)
    return Space(
        name="fitted",
        features=classifier,
        width=fitted.WIDTH,
        logits=classifier.classes,
        classes=classifier.classes,
        held_out=held_out,
    )


def _judge(config: ScoreConfig, world: World) -> Space:
    from repa_fast.encoders.digits import NUM_CLASSES, RESOLUTION, WIDTH, DigitsJudge

    if config.enc_weights:
        raise ValueError(f"enc_weights is {config.enc_weights}, expected none: it brings its own")
    judge = DigitsJudge().to(world.device)
    metadata = open_dataset(config.dataset, config.split).metadata if config.dataset else None
    ours = metadata is not None and metadata.class_names == digits_metadata().class_names

    @torch.no_grad()
    def features(images: torch.Tensor) -> Features:
        pool = judge.features(at_size(images, RESOLUTION))
        return Features(pool, logits=judge.vit.head(pool) if ours else None)

    classes = NUM_CLASSES * ours
    note = _resized(config, RESOLUTION)
    return Space(
        name="digits-judge",
        features=features,
        width=WIDTH,
        logits=classes,
        classes=classes,
        note=note,
    )


def _encoder(config: ScoreConfig, world: World) -> Space:
    spec = encoders.spec(config.features)
    resolution = _resolution(config)
    side = resolution if resolution in spec.input_sizes else min(spec.input_sizes)
    encoder = encoders.load(spec.name, side, world.device, config.enc_weights)
    return Space(
        name=spec.name,
        features=lambda images: Features(mean_patch_tokens(encoder, at_size(images, side))),
        width=spec.width,
        note=_resized(config, side),
    )


def _resolution(config: ScoreConfig) -> int:
    """Return the pixels of a side of the real images."""
    if config.dataset:
        return open_dataset(config.dataset, config.split).metadata.resolution
    return ImageFile(config.reference).height


def _resized(config: ScoreConfig, side: int) -> str:
    return "" if _resolution(config) == side else f"images resized to {side} pixels"


def at_size(images: torch.Tensor, side: int) -> torch.Tensor:
    """Return uint8 images (B, 3, R, R) as (B, 3, side, side): as they are where R is that.

    Others are resized bicubically, with antialiasing, and rounded to uint8 again.

    Raises:
        ValueError: they are not square.
    """
    height, width = images.shape[-2:]
    if height != width:
        raise ValueError(f"images are {height}x{width}, expected square ones")
    if height == side:
        return images
    resized = F.interpolate(images.float(), (side, side), mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)
