"""Features that are fitted on a dataset's own rows, and what they say of samples."""

import json
from unittest import mock

import numpy as np
import pytest
import torch

from repa_fast.data.open import open_dataset
from repa_fast.distributed import World
from repa_fast.eval import fitted
from repa_fast.eval.fitted import HeldOut, at_side, changed, fit, held_out_rows
from repa_fast.eval.metrics import EvalConfig, Scorer, evaluate
from repa_fast.eval.reference import ImageFile
from repa_fast.eval.spaces import ScoreConfig
from tests.analysis.analysing import COLOURS, coloured, noise_images, planes, write_table
from tests.refusals import refused

ALONE = World(0, 1, torch.device("cpu"))
ROWS, VAL, SAMPLES, CLASSES = 120, 30, 70, len(COLOURS)
FEW = 25
"""Steps, which are enough for colours."""


@pytest.fixture(autouse=True, scope="module")
def few_steps():
    with mock.patch.object(fitted, "STEPS", FEW):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of the colours of their classes, and a val split."""
    folder = tmp_path_factory.mktemp("colours")
    for split, count, seed in (("train", ROWS, 0), ("val", VAL, 1)):
        write_table(folder / f"{split}.lance", *coloured(count, seed))
    return folder


@pytest.fixture(scope="module")
def fit_once(data):
    return fit(open_dataset(data), 0, ALONE)


def state_of(world: World, folder: str, seed: int) -> tuple[dict, HeldOut]:
    with mock.patch.object(fitted, "STEPS", 3):
        classifier, held_out = fit(open_dataset(folder), seed, world)
    return classifier.state_dict(), held_out


def equal(one: dict, other: dict) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_classifier_knows_rows_that_it_was_not_fitted_on(fit_once):
    classifier, held_out = fit_once
    assert held_out == HeldOut(1.0, VAL, ROWS)
    text = "classifier on held-out real rows: 100.0 % of 30 (fitted on 120)"
    assert str(held_out) == text
    images, labels = coloured(50, seed=7)
    features = classifier(planes(images))
    assert features.pool.shape == (50, fitted.WIDTH) and features.logits.shape == (50, CLASSES)
    assert features.pool.dtype == torch.float32 and not features.pool.requires_grad
    assert (features.logits.argmax(1).numpy() == labels).all()
    whole = classifier.head(features.pool)
    assert torch.equal(whole, features.logits)


def test_it_is_a_function_of_rows_and_seed_and_nobody_elses_draws_change(data, ranks):
    """On two processes too, of which the first one fits."""
    before = torch.get_rng_state()
    one = state_of(ALONE, str(data), 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    for state, held_out in [state_of(ALONE, str(data), 0), *ranks(state_of, str(data), 0)]:
        assert equal(state, one[0]) and held_out == one[1]
    assert not equal(state_of(ALONE, str(data), 1)[0], one[0])


def test_a_fifth_of_each_class_is_held_out_where_there_is_no_val_split(data, tmp_path):
    write_table(tmp_path / "train.lance", *coloured(66, seed=0))
    _, held_out = fit(open_dataset(tmp_path), 0, ALONE)
    assert held_out == HeldOut(1.0, 12, 54)  # 2 of each class's 11
    with mock.patch.object(fitted, "STEPS", 2):
        _, of_val = fit(open_dataset(data, "val"), 0, ALONE)
    assert of_val.rows == 6 and of_val.fitted_rows == 24  # 1 of 5


@pytest.mark.parametrize("counts, expected", [
    ([10, 10], [2, 2]), ([1, 2, 3], [0, 1, 1]), ([1, 1], [0, 0]), ([8, 100], [2, 20]),
])  # fmt: skip
def test_every_class_of_two_rows_has_one_on_either_side(counts, expected):
    labels = np.random.default_rng(0).permutation(np.repeat(range(len(counts)), counts))
    held = held_out_rows(labels, np.random.default_rng(0)).numpy()
    assert np.bincount(labels[held], minlength=len(counts)).tolist() == expected


def test_single_rows_are_fitted_on_and_say_nothing_of_accuracy(tmp_path, monkeypatch):
    monkeypatch.setattr(fitted, "STEPS", 2)
    write_table(tmp_path / "train.lance", *coloured(CLASSES, seed=0))
    _, held_out = fit(open_dataset(tmp_path), 0, ALONE)
    assert held_out == HeldOut(None, 0, CLASSES)
    assert str(held_out) == "classifier on held-out real rows: none (fitted on 6)"


def test_no_more_rows_are_read_than_it_is_fitted_on(data, monkeypatch):
    monkeypatch.setattr(fitted, "ROWS", 20)
    monkeypatch.setattr(fitted, "STEPS", 2)
    _, held_out = fit(open_dataset(data), 0, ALONE)
    assert (held_out.rows, held_out.fitted_rows) == (20, 20)


def test_images_of_any_size_are_seen_at_one():
    large = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    means = large.double().unflatten(3, (32, 2)).unflatten(2, (32, 2)).mean((3, 5))
    assert torch.allclose(at_side(large).double(), means / 127.5 - 1, atol=1e-6)
    own = large[..., :32, :32]
    assert torch.equal(at_side(own), own.float() / 127.5 - 1)
    for side in (8, 16, 31, 48):
        grey = torch.full((1, 3, side, side), 51, dtype=torch.uint8)
        assert torch.allclose(at_side(grey), torch.full((1, 3, 32, 32), -0.6))


def test_images_are_moved_and_lit_but_not_mirrored():
    """A ramp from left to right and from top to bottom still rises, by as much as it is lit."""
    ramp = torch.arange(32.0)[None] + 100 * torch.arange(32.0)[:, None]
    images = ramp.expand(200, 3, 32, 32)
    found = changed(images, torch.Generator().manual_seed(0))
    across = found[:, 0, 16].diff(dim=1)[:, 8:24]
    contrast = across.mean(1)
    assert torch.allclose(across, contrast[:, None].expand_as(across), atol=1e-2)
    assert contrast.min() > 0.8 - 1e-2 and contrast.max() < 1.2 + 1e-2 and contrast.std() > 0.05
    middle = found[:, 0, 16, 16] / contrast
    rows, columns = (middle / 100).round() - 16, middle.round() % 100 - 16
    for moved in (rows, columns):
        assert moved.unique().tolist() == [-3, -2, -1, 0, 1, 2, 3]


@pytest.fixture
def samples(tmp_path):
    """(images, labels or None) -> an .npz as `generate` writes it."""

    def write(images, labels):
        arrays = {} if labels is None else {"arr_1": labels}
        np.savez(tmp_path / "samples.npz", arr_0=images, **arrays)
        return str(tmp_path / "samples.npz")

    return write


def judged(samples: str, **of) -> tuple[dict, str]:
    out = samples.replace(".npz", ".out.json")
    table = evaluate(EvalConfig(samples=samples, kid_subsets=3, out=out, **of))
    with open(out) as file:
        return json.load(file), table


def test_samples_of_the_classes_they_were_asked_for_are_told_from_others(data, samples):
    images, labels = coloured(SAMPLES, seed=5)
    labels[:21] = (labels[:21] + 1) % CLASSES
    found, table = judged(samples(images, labels), dataset=str(data), features="fitted")
    assert found["scores"]["class accuracy"] == pytest.approx(49 / 70)
    assert found["classifier"] == {
        "classes": CLASSES, "accuracy": 1.0, "rows": VAL, "fitted_rows": ROWS,
    }  # fmt: skip
    assert "| class accuracy | 0.7 |" in table
    assert "classifier on held-out real rows: 100.0 % of 30 (fitted on 120); class" in table
    assert "class accuracy by chance 0.167; seed 0." in table


def test_samples_of_the_dataset_are_nearer_than_noise(data, samples):
    scorer = Scorer(ScoreConfig(dataset=str(data), features="fitted", kid_subsets=3), ALONE)

    def compared(images, labels) -> dict:
        return scorer.compare(scorer.measure_file(ImageFile(samples(images, labels))))

    like = compared(*coloured(SAMPLES, seed=5))
    noise = compared(noise_images(SAMPLES), None)
    assert like["class accuracy"] == 1 and "class accuracy" not in noise
    assert noise["Frechet distance"] > 10 * like["Frechet distance"] > 0


@pytest.mark.parametrize("of, words", [
    ({"reference": "samples"}, ["features is fitted, expected a dataset", "samples.npz"]),
    ({"dataset": "data", "enc_weights": "x.pth"}, ["enc_weights is x.pth, expected none"]),
    ({"dataset": "one"}, ["train.lance has rows of one class only", "expected at least 2"]),
    ({"dataset": "other"}, ["val.lance has other classes than .*train.lance"]),
    ({"dataset": "data"}, [r"samples.npz, .* has labels 0..6, expected 0..5"]),
])  # fmt: skip
def test_what_cannot_be_fitted_or_told_is_refused(data, samples, tmp_path, monkeypatch, of, words):
    monkeypatch.setattr(fitted, "STEPS", 1)
    images, _ = coloured(8, seed=0)
    write_table(tmp_path / "one" / "train.lance", images, [2] * 8)
    for split, classes in (("train", 3), ("val", 4)):
        write_table(tmp_path / "other" / f"{split}.lance", images, [0, 1] * 4, classes)
    file = samples(images, np.arange(8) % 7)
    places = {
        "samples": file,
        "data": str(data),
        "one": str(tmp_path / "one"),
        "other": str(tmp_path / "other"),
        "x.pth": "x.pth",
    }
    named = {name: places[value] for name, value in of.items()}
    refused(lambda: judged(file, features="fitted", **named), *words)


def test_held_out_digits_are_told_apart(digits_dir, heavy):
    with mock.patch.object(fitted, "STEPS", 300):
        _, held_out = fit(open_dataset(digits_dir), 0, ALONE)
    assert held_out.rows == 297 and held_out.accuracy > 0.97
