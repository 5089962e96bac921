"""`repa-fast eval`: which images are compared, by which features, and what is written of it."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from repa_fast import encoders
from repa_fast.data.dataset import LatentDataset
from repa_fast.data.digits import digit_images
from repa_fast.distributed import World
from repa_fast.encoders.digits import DigitsJudge
from repa_fast.eval import inception, metrics, reference, scores, spaces
from repa_fast.eval.inception import Features
from repa_fast.eval.metrics import EvalConfig, Scorer, evaluate
from repa_fast.testing import seeded
from tests.analysis.analysing import noise_images, planes, write_npz, write_table
from tests.refusals import refused

CPU = torch.device("cpu")
REAL, SAMPLES = 43, 37
"""Images; neither is a multiple of a batch or of two processes."""
MANY, ZEROS = 192, [0] * 192
"""Images, which are enough for the judge's distance, and labels."""
SMALL = {"kid_subsets": 5, "kid_size": 20, "batch_size": 8}
WIDTHS = {"pool": 6, "spatial": 5, "logits": 4}
"""Of the stand-in's features: few, so that little of their distance is rounding."""


class SmallInception:
    """Three fixed linear maps of the pixels, with the interface of Inception."""

    def __init__(self, weights: str = "", device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def __call__(self, images: torch.Tensor) -> Features:
        flat = images.flatten(1).float() / 255
        maps = (
            seeded((flat.shape[1], width), seed=seed) for seed, width in enumerate(WIDTHS.values())
        )
        return Features(*(flat @ one for one in maps))


@contextmanager
def small_inception() -> Iterator[None]:
    """SmallInception in the place of the Inception, and its widths in that of the published."""
    pool, spatial, logits = WIDTHS.values()
    shapes = {"mu": (pool,), "sigma": (pool, pool), "mu_s": (spatial,), "sigma_s": (spatial,) * 2}
    widths = {"POOL_WIDTH": pool, "SPATIAL_WIDTH": spatial, "CLASSES": logits}
    with (
        mock.patch.multiple(inception, **widths),
        mock.patch.object(spaces, "Inception", SmallInception),
        mock.patch.object(reference, "SHAPES", shapes),
    ):
        yield


def evaluate_all(world: World, configs: list[EvalConfig]) -> list[bool]:
    """Evaluate one after the other inside a session; which of them this process wrote."""
    with small_inception(), mock.patch.object(metrics, "session", return_value=nullcontext(world)):
        return [bool(metrics.evaluate(config)) for config in configs]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder: a table of noise, its images as npz, samples of darker noise; a broken table."""
    folder = tmp_path_factory.mktemp("files")
    real = noise_images(REAL)
    write_table(folder / "data" / "train.lance", real, np.arange(REAL) % 2)
    write_npz(folder / "real.npz", real)
    write_npz(folder / "samples.npz", noise_images(SAMPLES, seed=1, spread=200))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.analysis.analysing.encode", lambda pixels: b"no image")
        write_table(folder / "bad" / "train.lance", real[:5], [0] * 5)
    return folder


@pytest.fixture
def small():
    with small_inception():
        yield


def settings(files: Path, **changes) -> EvalConfig:
    """Of the samples against the table."""
    fields = {"samples": files / "samples.npz", "dataset": files / "data", "num_samples": SAMPLES}
    named = {name: str(v) if isinstance(v, Path) else v for name, v in (fields | changes).items()}
    return EvalConfig(**SMALL | named)


def judged(config: EvalConfig) -> dict:
    """What `evaluate` writes."""
    table, out = evaluate(config), Path(config.out)
    assert out.with_suffix(".md").read_text() == table + "\n"
    return json.loads(out.read_text())


@pytest.fixture
def judge(files, tmp_path):
    """(changes) -> what is written of the samples against the table, with these settings."""
    return lambda **changes: judged(settings(files, out=tmp_path / "new" / "out.json", **changes))


@pytest.fixture(scope="module")
def direct(files, tmp_path_factory):
    """What is written without changes."""
    with small_inception():
        return judged(settings(files, out=tmp_path_factory.mktemp("direct") / "out.json"))


def distance(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """The Frechet distance of features, all at once, and its rounding.

    Where an eigenvalue should be 0 its error is about eps times the squared scale of the
    covariances, of which the root is taken.
    """
    moments = [scores.statistics(of.numpy()) for of in (a, b)]
    rounding = 4 * a.shape[1] * np.sqrt(np.finfo(np.float64).eps)
    total = sum(np.trace(cov) for _, cov in moments)
    return scores.frechet_distance(*moments[0], *moments[1]), rounding * total


def test_scores_are_those_of_the_features(direct):
    """Every score from features that are computed here, all images at once."""
    found = direct["scores"]
    stand_in = SmallInception()
    real = stand_in(planes(noise_images(REAL)))
    samples = stand_in(planes(noise_images(SAMPLES, seed=1, spread=200)))
    for name, kind in (("FID", "pool"), ("sFID", "spatial")):
        expected, rounding = distance(getattr(real, kind), getattr(samples, kind))
        assert expected > 100 * rounding
        assert found[name] == pytest.approx(expected, rel=1e-5, abs=rounding)  # fp32 features
    expected = scores.inception_score(samples.logits)
    assert found["inception score"] == pytest.approx(expected, rel=1e-5)
    precision, recall = scores.precision_recall(real.pool, samples.pool)
    assert (found["precision"], found["recall"]) == (precision, recall)
    mean, deviation = scores.kid(real.pool, samples.pool, subsets=5, size=20, seed=0)
    assert found["KID (20 images)"] == pytest.approx(mean, rel=1e-4)
    assert found["KID, deviation"] == pytest.approx(deviation, rel=1e-4)
    assert len(found) == 7


def test_a_written_reference_is_as_good_as_its_dataset(files, direct, judge, tmp_path, small):
    path = tmp_path / "there" / "reference.npz"
    said = evaluate(settings(files, samples="", write_reference=path))
    assert said == f"{path}: {REAL} images, {REAL} of them kept"
    stored = judge(dataset="", reference=path)
    assert stored["scores"] == pytest.approx(direct["scores"], rel=1e-9)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert stored["reference"]["name"] == f"reference.npz, sha256 {sha256}"


def test_the_moments_of_a_reference_are_not_those_of_its_images(
    files, direct, judge, tmp_path, small, monkeypatch
):
    """A published file keeps 10,000 images of many more, and does not say of how many."""
    path = tmp_path / "reference.npz"
    monkeypatch.setattr(metrics, "REFERENCE_IMAGES", 20)
    evaluate(settings(files, write_reference=path))
    with np.load(path) as content:
        kept = content["arr_0"]
    places = [np.flatnonzero((noise_images(REAL) == one).all((1, 2, 3))) for one in kept]
    assert [len(place) for place in places] == [1] * 20
    assert (np.diff(np.concatenate(places)) > 0).all()
    stored = judge(dataset="", reference=path)
    for name in ("FID", "sFID", "inception score"):
        assert stored["scores"][name] == pytest.approx(direct["scores"][name], rel=1e-9)
    assert stored["scores"]["recall"] != direct["scores"]["recall"]
    assert stored["reference"] | {"name": ""} == {"name": "", "count": None, "rows": 20}
    text = (tmp_path / "new" / "out.md").read_text()
    assert "stored moments, neighbours among 20. " in text


@pytest.mark.parametrize(
    "features, name", [("inception", "FID"), ("digits-judge", "Frechet distance")]
)
def test_the_references_own_images_are_perfect(tmp_path, judge, small, features, name):
    images = noise_images(MANY)
    file = write_npz(tmp_path / "real.npz", images)
    of = {"samples": file, "num_samples": 0, "dataset": write_table(tmp_path / "t", images, ZEROS)}
    found = judge(**of, features=features, kid_size=MANY)["scores"]
    assert found["precision"] == found["recall"] == 1
    real = planes(images)
    rows = SmallInception()(real).pool if name == "FID" else DigitsJudge().features(real)
    _, rounding = distance(rows, rows)
    assert abs(found[name]) < rounding < 1e-2
    assert found.get("MMD", 0) == pytest.approx(0, abs=1e-9)  # 1000 times rounding of 1
    assert ("MMD" in found) == (features != "inception")


@pytest.mark.parametrize("features", ["digits-vit", "digits-judge"])
def test_digits_in_a_nets_features(digits_dir, judge, tmp_path, features):
    """Some digits against those of another split, by features that are computed here."""
    net = DigitsJudge().features
    if features == "digits-vit":
        encoder = encoders.load("digits-vit", 16, CPU)
        net = lambda images: encoder(images).mean(1)  # noqa: E731
    train, val = (digit_images(split)[0] for split in ("train", "val"))
    samples, real = (net(planes(of)).detach() for of in (train[:290], val))
    expected, rounding = distance(samples, real)
    described = judge(
        samples=write_npz(tmp_path / "train.npz", train[:300]), num_samples=290,
        dataset=digits_dir, split="val", features=features, batch_size=64,
    )  # fmt: skip
    found = described["scores"]
    assert found["Frechet distance"] == pytest.approx(expected, rel=1e-4, abs=rounding)
    assert 0.7 < found["precision"] <= 1 and 0.5 < found["recall"] <= 1
    assert "FID" not in found and "inception score" not in found and found["MMD"] >= 0
    assert described["samples"]["count"] == 290
    assert described["reference"]["count"] == described["reference"]["rows"] == 297
    assert described["reference"]["name"].startswith("digits/val.lance, version ")


def test_images_of_a_file_are_the_reference_of_other_features(files, judge):
    """Its stored moments are the Inception's; an npz without any does as well."""
    table = judge(features="digits-judge")
    images = judge(features="digits-judge", dataset="", reference=files / "real.npz")
    assert images["scores"] == pytest.approx(table["scores"], rel=1e-5)  # fp32 features
    assert images["reference"]["count"] == images["reference"]["rows"] == REAL
    assert images["reference"]["name"].startswith("arr_0 of real.npz, sha256 ")


def test_a_distance_of_too_few_images_is_refused_and_the_other_scores_are_not(
    files, judge, tmp_path, capsys
):
    """In 96 features; of too few samples, and then of too few real images."""
    many = write_npz(tmp_path / "many.npz", noise_images(MANY, seed=1))
    for of, images in (({}, f"{SAMPLES} images"), ({"samples": many}, f"{REAL} real images")):
        found = judge(features="digits-judge", num_samples=0, **of)
        why = f"{images}, expected at least 192 (twice the width 96)"
        assert found["refused"] == {"Frechet distance": why}
        assert set(found["scores"]) == {
            "precision", "recall", "KID (20 images)", "KID, deviation", "MMD",
        }  # fmt: skip
        assert f"| Frechet distance | refused, {why} |" in (tmp_path / "new/out.md").read_text()
        said = capsys.readouterr().err
        assert said.startswith(f"repa-fast: Frechet distance: refused, {why}; ")
        assert ("--num-fid-samples" in said) == (not of) and "smaller width" in said


def test_each_distance_of_the_inception_has_its_own_least(files, judge, small):
    found = judge(num_samples=11)
    assert list(found["refused"]) == ["FID"] and "sFID" in found["scores"]
    assert found["refused"]["FID"] == "11 images, expected at least 12 (twice the width 6)"
    assert "inception score" in found["scores"] and not judge(num_samples=12)["refused"]


def test_stored_moments_are_taken_at_their_word_but_not_written_of_too_few_images(
    tmp_path, judge, small
):
    table = write_table(tmp_path / "few", noise_images(11), [0] * 11)
    few = EvalConfig(dataset=str(table), write_reference=str(tmp_path / "r.npz"))
    refused(lambda: evaluate(few), "few has 11 real images, expected at least 12")
    table = write_table(tmp_path / "enough", noise_images(12), [0] * 12)
    evaluate(EvalConfig(dataset=str(table), write_reference=str(tmp_path / "r.npz")))
    assert not judge(dataset="", reference=tmp_path / "r.npz", kid_size=5)["refused"]


def test_the_samples_of_a_run_are_its_newest(tmp_path, judge, small):
    """Also where its folder of them is named."""
    generated = tmp_path / "run" / "generated"
    generated.mkdir(parents=True)
    for number, name in enumerate(("b.npz", "c.npz", "a.npz", ".d.npz")):
        path = write_npz(generated / name, noise_images(20 + number))
        os.utime(path, (1e9 + number, 1e9 + number))
    for folder in (tmp_path / "run", generated):
        found = judge(samples=folder, num_samples=0)["samples"]
        assert found["name"].startswith("a.npz, sha256 ") and found["count"] == 22
    for name, weights in (("a", "ema"), ("b", "ema_2"), ("c", "ema_2")):
        (generated / f"{name}.json").write_text(f'{{"weights": "{weights}"}}')
    assert reference.newest_images(tmp_path / "run", "ema_2") == generated / "c.npz"
    words = "has no .npz of images of weights model, expected .* --ckpt .*run --weights model`"
    refused(lambda: reference.newest_images(generated, "model"), words)


def test_digits_of_a_file_with_labels_are_judged_by_class(digits_dir, judge, tmp_path):
    images, labels = digit_images("val")
    np.savez(tmp_path / "val.npz", arr_0=images, arr_1=labels)
    of = {"samples": tmp_path / "val.npz", "num_samples": 250, "features": "digits-judge"}
    found = judge(**of, dataset=digits_dir)
    right = (DigitsJudge()(planes(images[:250])).argmax(1).numpy() == labels[:250]).mean()
    assert 0.95 < found["scores"]["class accuracy"] == pytest.approx(right)
    assert found["classifier"] == {"classes": 10} and not found["refused"]
    assert "class accuracy by chance 0.1" in (tmp_path / "new" / "out.md").read_text()


def test_the_seed_chooses_the_subsets_of_kid(direct, judge, small):
    first, other = direct["scores"], judge(seed=1)["scores"]
    kid = {"KID (20 images)", "KID, deviation"}
    assert {name for name in first if first[name] != other[name]} == kid


def test_subsets_of_kid_have_no_more_images_than_there_are_and_results_lie_beside_the_samples(
    tmp_path, files, small
):
    samples = write_npz(tmp_path / "cfg-1.5.npz", noise_images(SAMPLES, seed=1))
    evaluate(settings(files, samples=samples, kid_size=1000))
    evaluate(settings(files, samples=samples, features="digits-judge"))
    results = {
        f"cfg-1.5.{of}.{kind}" for of in ("inception", "digits-judge") for kind in ("json", "md")
    }
    assert {path.name for path in tmp_path.iterdir()} == results | {samples.name}
    found = json.loads((tmp_path / "cfg-1.5.inception.json").read_text())["scores"]
    assert f"KID ({SAMPLES} images)" in found


def test_what_is_written_says_what_was_compared(files, judge, tmp_path, small):
    described = judge(seed=5)
    sha256 = hashlib.sha256((files / "samples.npz").read_bytes()).hexdigest()[:16]
    version = LatentDataset(files / "data").table.version
    samples, real = f"samples.npz, sha256 {sha256}", f"data/train.lance, version {version}"
    assert described["samples"] == {"name": samples, "count": SAMPLES}
    assert described["reference"] == {"name": real, "count": REAL, "rows": REAL}
    assert described["features"] == "inception"
    assert described["settings"]["seed"] == 5 and described["settings"]["batch_size"] == 8
    text = (tmp_path / "new" / "out.md").read_text()
    for part in (
        f"{SAMPLES} samples: {samples}. ",
        f"Reference: {real}, moments of {REAL} images, neighbours among {REAL}. ",
        "Features: inception; seed 5.",
    ):
        assert part in text.replace("\n", " ")
    for name, value in described["scores"].items():
        [row] = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
        assert float(row.split("|")[2]) == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("keep", [True, False])
def test_features_of_single_images_are_kept_where_asked(small, keep):
    scorer = Scorer(EvalConfig(dataset="data"), World(0, 1, CPU))
    batches = [(torch.arange(REAL), planes(noise_images(REAL)))]
    found = scorer.measure("noise", iter(batches), REAL, keep=keep)
    assert (found.rows is not None) == (found.logits is not None) == keep
    assert found.count == REAL and [len(mean) for mean, _ in (found.pool, found.spatial)] == [6, 5]


def test_two_processes_find_what_one_finds(ranks, files, tmp_path):
    """Also a reference, and fewer batches than processes."""
    reference = {"samples": "", "write_reference": "reference.npz"}
    changes = {"small": {}, "one batch": {"batch_size": 100}, "reference": reference}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        configs = [settings(files, out=folder / f"{n}.json", **of) for n, of in changes.items()]
        configs[-1].write_reference = str(folder / "reference.npz")
        if processes == 1:
            assert evaluate_all(World(0, 1, CPU), configs) == [True] * 3
        else:
            assert ranks(evaluate_all, configs) == [[True] * 3, [False] * 3]
    for name in ("small", "one batch"):
        one, two = (json.loads((tmp_path / folder / f"{name}.json").read_text()) for folder in "12")
        # moments are summed in another order: roots of eigenvalues that should be 0
        assert two["scores"] == pytest.approx(one["scores"], rel=1e-9, abs=1e-5), name
        assert two["samples"] == one["samples"]
        assert two["reference"]["count"] == one["reference"]["count"]
    one, two = (dict(np.load(tmp_path / folder / "reference.npz")) for folder in "12")
    assert one.keys() == two.keys() and np.array_equal(one.pop("arr_0"), two.pop("arr_0"))
    for name, array in one.items():
        assert np.allclose(array, two[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("changes, message", [
    ({"num_samples": 38}, rf"samples.npz has {SAMPLES} images, .* at least 38 \(--num-samples\)"),
    ({"dataset": "bad"}, r"train.lance row 0"),
    ({"dataset": ""}, "reference and dataset: expected one of them"),
    ({"reference": "reference.npz"}, "reference and dataset: expected one of them"),
    ({"dataset": "", "reference": "real.npz"}, "real.npz lacks mu, sigma, mu_s, sigma_s"),
    ({"num_samples": -1}, "num_samples is -1, expected at least 0"),
    ({"features": "digits-vit", "enc_weights": "file.pth"}, "brings its weights"),
    ({"samples": ""}, "samples is empty"),
    ({"samples": "absent.npz"}, "absent.npz is not an npz file"),
    ({"samples": "data"}, "data/generated has no .npz .* `repa-fast generate --ckpt data`"),
    ({"split": "val"}, "no dataset at"),
    ({"out": "scores.md"}, "out is scores.md, expected the name of a .json file"),
    ({"write_reference": "a.npz", "features": "digits-judge"}, "write_reference needs"),
    ({"write_reference": "a.npz", "dataset": "", "reference": "b.npz"}, "needs --dataset"),
])  # fmt: skip
def test_what_does_not_fit_is_named(files, monkeypatch, small, changes, message):
    monkeypatch.chdir(files)
    before = sorted(files.rglob("*"))
    refused(lambda: evaluate(settings(files, **changes)), message)
    assert sorted(files.rglob("*")) == before
