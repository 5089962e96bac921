"""`repa-fast eval`: which images are compared, by which features, and what is written of it."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
import torch

from repa_fast import encoders
from repa_fast.data.dataset import LatentDataset
from repa_fast.data.digits import digit_images
from repa_fast.distributed import World
from repa_fast.encoders.digits import DigitsJudge
from repa_fast.eval import metrics, scores
from repa_fast.eval.inception import Features, Inception
from repa_fast.eval.metrics import EvalConfig, Scorer, evaluate, feature_space
from tests.analysis.analysing import (
    WIDTHS,
    SmallInception,
    evaluate_all,
    noise_images,
    planes,
    small_inception,
    write_npz,
    write_table,
)
from tests.refusals import refused

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
REAL, SAMPLES = 43, 37
"""Images; neither is a multiple of a batch or of two processes."""
SMALL = {"kid_subsets": 5, "kid_size": 20, "batch_size": 8}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a table of noise, samples of darker noise, and the table's images as npz.

    Also damaged samples, and a table whose images are none.
    """
    folder = tmp_path_factory.mktemp("files")
    real = noise_images(REAL)
    write_table(folder / "data" / "train.lance", real, np.arange(REAL) % 2)
    write_npz(folder / "real.npz", real)
    samples = write_npz(folder / "samples.npz", noise_images(SAMPLES, seed=1, spread=200))
    data = bytearray(samples.read_bytes())
    data[len(data) // 2] ^= 0xFF
    (folder / "damaged.npz").write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.analysis.analysing.png", lambda pixels: b"no image")
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


def distance(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """The Frechet distance of features, by the eigenvalues of the product of their covariances.

    Also its rounding: where an eigenvalue should be 0 its error is about eps times the squared
    scale of the covariances, of which the root is taken.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    trace_root = np.sqrt(scipy.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    total = np.trace(cov_a) + np.trace(cov_b)
    found = ((a.mean(0) - b.mean(0)) ** 2).sum() + total - 2 * trace_root
    return found, 4 * len(cov_a) * np.sqrt(np.finfo(np.float64).eps) * total


def test_scores_are_those_of_the_features(direct):
    """Every score from features that are computed here, all images at once."""
    found = direct["scores"]
    stand_in = SmallInception()
    real = stand_in(planes(noise_images(REAL)))
    samples = stand_in(planes(noise_images(SAMPLES, seed=1, spread=200)))
    for name, one, other in (
        ("FID", real.pool, samples.pool),
        ("sFID", real.spatial, samples.spatial),
    ):
        expected, rounding = distance(one.numpy(), other.numpy())
        assert expected > 100 * rounding
        assert found[name] == pytest.approx(expected, rel=1e-5, abs=rounding)  # fp32 features
    posterior = scipy.special.softmax(samples.logits.double().numpy(), axis=1)
    divergence = scipy.stats.entropy(posterior, posterior.mean(0)[None], axis=1).mean()
    assert found["inception score"] == pytest.approx(np.exp(divergence), rel=1e-5)
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
def test_the_references_own_images_are_perfect(files, judge, small, features, name):
    samples = {"samples": files / "real.npz", "num_samples": REAL}
    found = judge(**samples, features=features, kid_size=REAL)["scores"]
    assert found["precision"] == found["recall"] == 1
    real = planes(noise_images(REAL))
    rows = SmallInception()(real).pool if name == "FID" else DigitsJudge().features(real)
    _, rounding = distance(rows.numpy(), rows.numpy())
    assert abs(found[name]) < rounding < 1e-2
    assert found.get("MMD", 0) == pytest.approx(0, abs=1e-9)  # 1000 times rounding of 1
    assert ("MMD" in found) == (features != "inception")


@pytest.fixture(scope="module")
def val(tmp_path_factory):
    """The held-out digits as samples."""
    return write_npz(tmp_path_factory.mktemp("val") / "val.npz", digit_images("val")[0])


@pytest.mark.parametrize("features", ["digits-vit", "digits-judge"])
def test_digits_in_a_nets_features(digits, val, judge, features):
    """The held-out digits against the others, by features that are computed here."""
    net = DigitsJudge().features
    if features == "digits-vit":
        encoder = encoders.load("digits-vit", 16, CPU)
        net = lambda images: encoder(images).mean(1)  # noqa: E731
    images = (digit_images(split)[0] for split in ("train", "val"))
    real, samples = (net(planes(of)).detach().numpy() for of in images)
    expected, rounding = distance(samples[:290], real)
    described = judge(
        samples=val, dataset=digits, num_samples=290, features=features, batch_size=64
    )
    found = described["scores"]
    assert found["Frechet distance"] == pytest.approx(expected, rel=1e-4, abs=rounding)
    assert 0.7 < found["precision"] <= 1 and 0.5 < found["recall"] <= 1
    assert "FID" not in found and "inception score" not in found and found["MMD"] >= 0
    assert described["samples"]["count"] == 290
    assert described["reference"]["count"] == described["reference"]["rows"] == 1500


def test_the_split_is_the_one_asked_for(digits, val, judge):
    described = judge(
        samples=val, dataset=digits, split="val", num_samples=297, features="digits-judge",
        batch_size=64,
    )  # fmt: skip
    assert described["scores"]["precision"] == described["scores"]["recall"] == 1
    assert described["reference"]["count"] == 297
    assert described["reference"]["name"].startswith("digits/val.lance, version ")


def test_images_of_a_file_are_the_reference_of_other_features(files, judge):
    """Its stored moments are the Inception's; an npz without any does as well."""
    table = judge(features="digits-judge")
    images = judge(features="digits-judge", dataset="", reference=files / "real.npz")
    assert images["scores"] == pytest.approx(table["scores"], rel=1e-5)  # fp32 features
    assert images["reference"]["count"] == images["reference"]["rows"] == REAL
    assert images["reference"]["name"].startswith("arr_0 of real.npz, sha256 ")


def test_the_first_samples_are_taken(judge, tmp_path, small):
    few = write_npz(tmp_path / "few.npz", noise_images(SAMPLES, seed=1, spread=200)[:25])
    taken, alone = judge(num_samples=25), judge(samples=few, num_samples=25)
    assert taken["samples"]["count"] == 25 and taken["scores"] == alone["scores"]


@pytest.mark.parametrize("size", [1, 7, SAMPLES, 1000])
def test_batches_do_not_matter(direct, judge, small, size):
    found = judge(batch_size=size)["scores"]
    assert found == pytest.approx(direct["scores"], rel=1e-4)  # fp32 features


def test_the_seed_chooses_the_subsets_of_kid(direct, judge, small):
    first, again, other = direct["scores"], judge(seed=0)["scores"], judge(seed=1)["scores"]
    assert first == again
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


def test_the_inceptions_features_are_those_of_the_network(inception_weights):
    space = feature_space(EvalConfig(inception_weights=str(inception_weights)), CPU)
    images = planes(noise_images(1))
    expected = Inception(inception_weights)(images)
    assert (space.name, space.width) == ("inception", 2048)
    wanted = (expected.pool, expected.spatial, expected.logits)
    assert all(map(torch.equal, space.features(images), wanted))


@pytest.mark.parametrize("keep", [True, False])
def test_measured_moments_are_of_all_batches(keep, small, monkeypatch):
    class Means:
        """Features of an image are its mean, times the position."""

        def __init__(self, weights, device):
            pass

        def __call__(self, images):
            mean = images.float().mean((1, 2, 3))[:, None]
            return Features(*(mean * torch.arange(1, n + 1) for n in WIDTHS.values()))

    monkeypatch.setattr(metrics, "Inception", Means)
    scorer = Scorer(EvalConfig(dataset="data"), World(0, 1, CPU))
    images = noise_images(REAL)
    batches = zip(torch.arange(REAL).split(20), planes(images).split(20), strict=True)
    found = scorer.measure("noise", batches, REAL, keep=keep)
    means = images.reshape(REAL, -1).mean(1)
    assert found.count == REAL and (found.rows is not None) == (found.logits is not None) == keep
    for kind in ("pool", "spatial"):
        mean, cov = getattr(found, kind)
        scale = np.arange(1, WIDTHS[kind] + 1)
        assert np.allclose(mean, means.mean() * scale, rtol=1e-6)
        assert np.allclose(cov, means.var(ddof=1) * np.outer(scale, scale), rtol=1e-4)


def test_two_processes_find_what_one_finds(ranks, files, tmp_path):
    """Also a reference, and fewer batches than processes."""
    changes = {
        "small": {},
        "judge": {"features": "digits-judge"},
        "one batch": {"batch_size": 100},
        "reference": {"samples": "", "write_reference": "reference.npz"},
        "stored": {"dataset": "", "reference": "reference.npz"},
    }
    configs = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        for name, fields in changes.items():
            paths = ("write_reference", "reference")
            fields = {k: folder / v if k in paths else v for k, v in fields.items()}
            configs[processes, name] = settings(files, out=folder / f"{name}.json", **fields)
    one, two = ([configs[processes, name] for name in changes] for processes in (1, 2))
    assert evaluate_all(World(0, 1, CPU), one) == [True] * len(changes)
    assert ranks(evaluate_all, two) == [[True] * len(changes), [False] * len(changes)]
    for name in set(changes) - {"reference"}:
        one, two = (json.loads((tmp_path / folder / f"{name}.json").read_text()) for folder in "12")
        # moments are summed in another order: roots of eigenvalues that should be 0
        assert two["scores"] == pytest.approx(one["scores"], rel=1e-9, abs=1e-5), name
        assert two["samples"] == one["samples"]
        assert two["reference"]["count"] == one["reference"]["count"]
    with (
        np.load(tmp_path / "1" / "reference.npz") as one,
        np.load(tmp_path / "2" / "reference.npz") as two,
    ):
        assert set(one) == set(two) and np.array_equal(one["arr_0"], two["arr_0"])
        for key in set(one) - {"arr_0"}:
            assert np.allclose(one[key], two[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_samples": 38}, rf"samples.npz has {SAMPLES} images, .* at least 38"),
        ({"samples": "damaged.npz"}, r"damaged\.npz cannot be read"),
        ({"dataset": "bad"}, r"train.lance row 0"),
        ({"dataset": ""}, "reference and dataset: expected one of them"),
        ({"reference": "reference.npz"}, "reference and dataset: expected one of them"),
        ({"dataset": "", "reference": "real.npz"}, "real.npz lacks mu, sigma, mu_s, sigma_s"),
        ({"features": "vgg"}, "encoder.*vgg.*digits-vit"),
        ({"features": "dinov2-vit-b"}, "dinov2-vit-b: resolution is 16, expected 256"),
        ({"features": "digits-vit", "enc_weights": "file.pth"}, "brings its weights"),
        ({"samples": ""}, "samples is empty"),
        ({"samples": "absent.npz"}, "absent.npz is not an npz file"),
        ({"dataset": "absent"}, "no dataset at absent"),
        ({"split": "val"}, "no dataset at"),
        ({"dataset": "", "reference": "absent.npz"}, "absent.npz"),
        ({"out": "scores.md"}, "out is scores.md, expected the name of a .json file"),
        ({"write_reference": "a.npz", "features": "digits-judge"}, "write_reference needs"),
        (
            {"write_reference": "a.npz", "dataset": "", "reference": "b.npz"},
            "write_reference needs --dataset",
        ),
    ],
)
def test_what_does_not_fit_is_named(files, monkeypatch, small, changes, message):
    monkeypatch.chdir(files)
    before = sorted(files.rglob("*"))
    refused(lambda: evaluate(settings(files, **changes)), message)
    assert sorted(files.rglob("*")) == before
