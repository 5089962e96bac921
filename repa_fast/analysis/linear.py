"""Linear probing: how well a linear layer on frozen features tells the classes apart.

REPA (arXiv 2410.06940, appendix C.1) trains it on BatchNorm without parameters, with Adam and
cosine decay. Many probes, say one per block of a model, are trained as one batched matmul; they
share the order of the rows and nothing else.

Shapes: L probes, N training rows, M validation rows, F width, B batch, C classes.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from repa_fast.contracts import expect_floating, expect_shape
from repa_fast.diffusion.draws import stream

TOP = 5


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a probe is trained.

    Attributes:
        epochs: passes over the rows.
        batch: rows per step; all rows where there are fewer.
        learning_rate: Adam's at the first step; cosine decay to 0, step by step.
    """

    epochs: int
    batch: int
    learning_rate: float


PAPER = Recipe(epochs=90, batch=16_384, learning_rate=1e-3)
"""REPA's, for ImageNet: 7,020 steps."""
SMALL = Recipe(epochs=90, batch=256, learning_rate=1e-2)
"""For a few thousand rows, of which PAPER would make one step per epoch: 630 steps for 2,000, and
ten times the learning rate, so that weights can come as far."""


@dataclass(frozen=True)
class Accuracy:
    """What probes reached.

    Attributes:
        top1: (L) fp64, share of validation rows whose class has the largest logit.
        top5: (L) fp64, or is among the five largest; None below five classes.
        losses: (L, epochs), mean cross-entropy of each epoch's training batches.
    """

    top1: torch.Tensor
    top5: torch.Tensor | None
    losses: torch.Tensor


class Probes(nn.Module):
    """L linear layers from zero weights, each behind BatchNorm (arXiv 1502.03167) of its own."""

    def __init__(self, probes: int, width: int, num_classes: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(probes * width, affine=False, dtype=dtype)
        self.weight = nn.Parameter(torch.zeros(probes, width, num_classes, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(probes, 1, num_classes, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Turn features (L, B, F) of any dtype and device into logits (L, B, C)."""
        x = self.norm(x.to(self.weight).transpose(0, 1).flatten(1))  # (B, L * F)
        x = x.unflatten(1, self.weight.shape[:2]).transpose(0, 1)
        return torch.baddbmm(self.bias, x, self.weight)


def fit_probes(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    val_features: torch.Tensor,
    val_labels: torch.Tensor,
    num_classes: int,
    recipe: Recipe,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Accuracy:
    """Train a linear layer on each of L sets of features and evaluate it on held-out rows.

    Weights start at zero: the loss is convex. The last, incomplete batch of an epoch is left out;
    each epoch has its own order, so no row is left out for good.

    Args:
        train_features: (L, N, F), any floating dtype, computed with in fp32 (fp64 if they are); on
            any device, from where batches go to `device`.
        train_labels: (N) int64, in 0..num_classes - 1.
        val_features, val_labels: (L, M, F) and (M).
        seed: of the order of rows; the only randomness.

    Raises:
        ValueError: shapes that do not fit, fewer than two training rows or no validation row,
            features that are not finite, or labels out of range.
    """
    _check(train_features, train_labels, val_features, val_labels, num_classes)
    probes, _, width = train_features.shape
    dtype = torch.promote_types(train_features.dtype, torch.float32)
    model = Probes(probes, width, num_classes, dtype).to(device)
    losses = _train(model, train_features, train_labels, recipe, seed)
    hits = torch.zeros(TOP, probes, dtype=torch.int64, device=device)
    for start in range(0, len(val_labels), recipe.batch):
        rows = slice(start, start + recipe.batch)
        with torch.no_grad():
            logits = model.eval()(val_features[:, rows])
        best = logits.topk(min(TOP, num_classes), dim=-1).indices
        found = best == val_labels[rows].to(device)[:, None]  # (L, B, 5)
        hits[: best.shape[-1]] += found.sum(1).T
    hits = hits.double().cpu()
    return Accuracy(
        top1=hits[0] / len(val_labels),
        top5=hits.sum(0) / len(val_labels) if num_classes >= TOP else None,
        losses=losses.cpu(),
    )


def _train(
    model: Probes, features: torch.Tensor, labels: torch.Tensor, recipe: Recipe, seed: int
) -> torch.Tensor:
    """Train the probes; return the mean loss of each epoch, (L, epochs)."""
    optimizer = torch.optim.Adam(model.parameters())
    batch = min(recipe.batch, len(labels))
    steps = len(labels) // batch
    losses = model.bias.new_zeros(len(features), recipe.epochs)
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(labels), generator=stream(seed, epoch))
        for step, rows in enumerate(order[: steps * batch].split(batch)):
            logits = model(features[:, rows.to(features.device)])
            y = labels[rows.to(labels.device)].to(logits.device).expand(len(features), -1)
            loss = F.cross_entropy(logits.movedim(-1, 1), y, reduction="none").mean(1)
            optimizer.zero_grad()
            loss.sum().backward()
            progress = (epoch * steps + step) / (recipe.epochs * steps)
            decay = (1 + math.cos(math.pi * progress)) / 2
            optimizer.param_groups[0]["lr"] = recipe.learning_rate * decay
            optimizer.step()
            losses[:, epoch] += loss.detach() / steps
    return losses


def _check(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    val_features: torch.Tensor,
    val_labels: torch.Tensor,
    num_classes: int,
) -> None:
    if train_features.ndim != 3 or train_features.shape[1] < 2:
        raise ValueError(
            f"train_features have shape {tuple(train_features.shape)}, expected (L, N, F), N >= 2"
        )
    if not len(val_labels):
        raise ValueError("val_labels is empty, expected at least one validation row")
    probes, rows, width = train_features.shape
    for split, features, labels, count in (
        ("train", train_features, train_labels, rows),
        ("val", val_features, val_labels, len(val_labels)),
    ):
        expect_shape("fit_probes", f"{split}_features", features, (probes, count, width))
        expect_shape("fit_probes", f"{split}_labels", labels, (count,))
        expect_floating("fit_probes", f"{split}_features", features)
        for probe, of_probe in enumerate(features):
            if not of_probe.isfinite().all():
                raise ValueError(f"{split}_features[{probe}] holds values that are not finite")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"{split}_labels lie in [{low}, {high}], expected [0, {num_classes - 1}]"
            )
