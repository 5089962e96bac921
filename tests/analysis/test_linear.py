"""Linear probes against torch's own modules, scikit-learn, chance and what is separable."""

import math
from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from repa_fast.analysis.linear import PAPER, SMALL, Recipe, fit_probes
from repa_fast.data.digits import digit_images
from repa_fast.diffusion.draws import stream
from repa_fast.testing import seeded
from tests.refusals import refused

SHORT = Recipe(epochs=6, batch=32, learning_rate=1e-2)
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def clusters(rows, classes=4, width=6, distance=8.0, seed=0, dtype=torch.float64):
    """Features (rows, width) around one centre per class, with spread 1, and their labels.

    The centres are +-distance along axes: a linear layer tells them apart.
    """
    labels = torch.arange(rows) % classes
    centres = torch.cat([torch.eye(width), -torch.eye(width)])[:classes].to(dtype) * distance
    return centres[labels] + seeded((rows, width), seed=seed, dtype=dtype), labels


def fit(train, val, num_classes=4, recipe=SHORT, **options):
    return fit_probes(*train, *val, num_classes, recipe, **options)


def alone(features, labels):
    return features[None], labels


def plain_probe(features, labels, held_out, num_classes, recipe, seed):
    """(mean loss of each epoch, logits of the held-out rows), by torch's modules alone."""
    norm = nn.BatchNorm1d(features.shape[1], affine=False, dtype=features.dtype)
    layer = nn.Linear(features.shape[1], num_classes, dtype=features.dtype)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.Adam(layer.parameters(), recipe.learning_rate)
    steps = len(labels) // recipe.batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * steps)
    losses = []
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(labels), generator=stream(seed, epoch))
        of_epoch = []
        for step in range(steps):
            rows = order[step * recipe.batch : (step + 1) * recipe.batch]
            loss = nn.functional.cross_entropy(layer(norm(features[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            of_epoch.append(loss.item())
        losses.append(sum(of_epoch) / steps)
    with torch.no_grad():
        return torch.tensor(losses, dtype=features.dtype), layer(norm.eval()(held_out))


@pytest.mark.parametrize("rows", [96, 117])  # 117 leaves an incomplete batch
def test_a_probe_is_batch_norm_a_linear_layer_and_adam(rows):
    features, labels = clusters(rows, classes=7, distance=1.0)
    held_out, of_held_out = clusters(70, classes=7, distance=1.0, seed=1)
    losses, logits = plain_probe(features, labels, held_out, 7, SHORT, seed=3)
    got = fit(alone(features, labels), alone(held_out, of_held_out), 7, seed=3)
    torch.testing.assert_close(got.losses[0], losses, **EXACT)
    ranks = (logits > logits.gather(1, of_held_out[:, None])).sum(1)
    assert got.top1.item() == (ranks < 1).double().mean().item()
    assert got.top5.item() == (ranks < 5).double().mean().item()
    assert 0.2 < got.top1.item() < got.top5.item() < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_separable_classes_are_told_apart(dtype):
    train, val = clusters(400, dtype=dtype), clusters(200, dtype=dtype, seed=1)
    got = fit(alone(*train), alone(*val))
    assert got.top1.tolist() == [1.0] and got.top5 is None
    assert got.losses.dtype == torch.float32 and got.losses.shape == (1, SHORT.epochs)
    assert got.losses[0, -1] < got.losses[0, 0] < math.log(4)


def test_many_probes_at_once_are_each_alone():
    shift = torch.arange(3)[:, None, None]

    def three(rows: int, seed: int):
        sets = [clusters(rows, 6, distance=1.0, seed=10 * seed + n) for n in range(3)]
        features = torch.stack([features for features, _ in sets])
        return torch.tensor([1.0, 30.0, 0.2])[:, None, None] * features + shift, sets[0][1]

    train, val = three(150, seed=0), three(200, seed=1)
    together = fit(train, val, 6, seed=5)
    for n in range(3):
        one = fit(alone(train[0][n], train[1]), alone(val[0][n], val[1]), 6, seed=5)
        torch.testing.assert_close(together.losses[n], one.losses[0], **EXACT)
        assert together.top1[n] == one.top1[0] and together.top5[n] == one.top5[0]
    assert len(set(together.top1.tolist())) == 3


def test_the_digits_are_known_as_well_as_by_logistic_regression():
    (train, train_labels), (val, val_labels) = (digit_images(split) for split in ("train", "val"))
    train, val = (x[..., 0].reshape(len(x), -1) / 255 for x in (train, val))
    mean, std = train.mean(0), train.std(0) + 1e-5
    regression = LogisticRegression(max_iter=1000)
    regression.fit((train - mean) / std, train_labels)
    expected = regression.score((val - mean) / std, val_labels)
    of_train = alone(torch.from_numpy(train).float(), torch.from_numpy(train_labels))
    of_val = alone(torch.from_numpy(val).float(), torch.from_numpy(val_labels))
    got = fit(of_train, of_val, 10, SMALL).top1.item()
    spread = math.sqrt(2 * expected * (1 - expected) / len(val))  # of two independent accuracies
    assert expected > 0.93
    assert abs(got - expected) < 2 * spread


def test_equal_seeds_give_equal_bits_and_a_batch_of_more_rows_than_there_are_takes_all():
    train, val = (alone(*clusters(50, distance=1.0, seed=seed)) for seed in (0, 1))
    first, again, other = (fit(train, val, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.losses, again.losses) and torch.equal(first.top1, again.top1)
    assert not torch.equal(first.losses, other.losses)
    whole, larger = (fit(train, val, recipe=replace(SHORT, batch=batch)) for batch in (50, 1000))
    torch.testing.assert_close(larger.losses, whole.losses, **EXACT)
    assert (PAPER.epochs, PAPER.batch, PAPER.learning_rate) == (90, 16_384, 1e-3)


@pytest.mark.parametrize("changes, message", [
    ({"train_features": torch.zeros(40, 6)}, r"shape \(40, 6\), expected \(L, N, F\)"),
    ({"train_features": torch.zeros(1, 1, 6)}, "N >= 2"),
    ({"train_labels": torch.zeros(39, dtype=torch.int64)}, r"train_labels has shape \(39,\)"),
    ({"val_features": torch.zeros(1, 20, 5)}, r"expected \(1, 20, 6\)"),
    ({"val_features": torch.zeros(2, 20, 6)}, r"expected \(1, 20, 6\)"),
    ({"val_labels": torch.zeros(0, dtype=torch.int64)}, "val_labels is empty"),
    ({"train_labels": torch.arange(40) % 5}, r"train_labels lie in \[0, 4\], expected \[0, 3\]"),
    ({"val_labels": torch.arange(20) % 4 - 1}, r"val_labels lie in \[-1, 2\]"),
    ({"train_features": torch.full((1, 40, 6), math.nan)}, r"train_features\[0\] holds"),
    ({"val_features": torch.full((1, 20, 6), math.inf)}, r"val_features\[0\] holds"),
    ({"train_features": torch.zeros(1, 40, 6, dtype=torch.int64)}, "dtype torch.int64"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(changes, message):
    arguments = {
        "train_features": torch.zeros(1, 40, 6),
        "train_labels": torch.arange(40) % 4,
        "val_features": torch.zeros(1, 20, 6),
        "val_labels": torch.arange(20) % 4,
    } | changes
    refused(lambda: fit_probes(**arguments, num_classes=4, recipe=SHORT), message)
