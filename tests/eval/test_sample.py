"""A picture of samples: which class a name means, and what is in the picture."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repa_fast import cli
from repa_fast.checkpoint.export import export
from repa_fast.eval import pictures
from repa_fast.eval.load import load
from repa_fast.eval.sample import (
    SampleConfig,
    StripConfig,
    class_index,
    class_names,
    draw_strip,
    sample,
    strip,
)
from repa_fast.eval.sampling import line_of
from tests.eval import checkpoints
from tests.refusals import refused

NAMES = ("tench, Tinca tinca", "Red Fox, Vulpes", "arctic fox", "crane", "ox", "crane", "12")
NUMBERS = tuple(str(number) for number in range(1000))
IMAGENET = class_names(NUMBERS)  # a thousand numbered classes are those
PITCH = 3 * 16 + pictures.GAP  # digits are shown three times as large
ABOVE = pictures.TITLE_PIXELS


@pytest.fixture
def picture(run, tmp_path):
    """(settings) -> the picture, uint8 (H, W, 3)."""

    def make(**settings) -> np.ndarray:
        out = tmp_path / "deep" / "x.png"
        assert sample(SampleConfig(ckpt=str(run), out=str(out), num_steps=2, **settings)) == out
        with Image.open(out) as image:
            assert image.format == "PNG"
            return np.asarray(image)

    return make


def cell(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    """One image of the picture, with its three-fold enlargement."""
    top, left = row * (PITCH + ABOVE) + ABOVE, column * PITCH
    return picture[top : top + 48, left : left + 48]


@pytest.mark.parametrize("wanted, names, expected", [
    ("0", NAMES, 0),  # a number
    ("tench", NAMES, 0),  # a synonym
    ("TINCA TINCA", NAMES, 0),
    ("red fox", NAMES, 1),
    ("Arctic Fox", NAMES, 2),
    ("vulp", NAMES, 1),  # a part
    ("ox", NAMES, 4),  # a name before a part of others
    ("12", NAMES, 6),  # a name before a number; there is no class 12
    ("0", ("1", "0"), 1),
    ("golden retriever", IMAGENET, 207),
    ("toilet tissue", IMAGENET, 999),
])  # fmt: skip
def test_a_class_is_a_number_a_name_a_synonym_or_a_part(wanted, names, expected):
    assert class_index(wanted, names) == expected


@pytest.mark.parametrize("wanted, names, shown", [
    ("fox", NAMES, [r"1 \(Red Fox, Vulpes\)", r"2 \(arctic fox\)"]),  # a part of two
    ("crane", NAMES, [r"3 \(crane\)", r"5 \(crane\)"]),  # the name of two
    ("wolf", NAMES, [r"0 \(tench", r"4 \(ox\)"]),  # of none: some that there are
    ("7", NAMES, ["expected a number below 7"]),
    ("-1", NAMES, ["expected a number below 7"]),
    ("", NAMES, ["expected a number below 7 or a name"]),
    ("crane", IMAGENET, [r"134 \(crane\), 517 \(crane\)"]),
    ("class", [f"class {number}" for number in range(1000)], []),  # too many to be shown
])  # fmt: skip
def test_an_unknown_or_ambiguous_class_is_refused_with_some_that_there_are(wanted, names, shown):
    text = refused(lambda: class_index(wanted, names), f"class is {wanted!r}, expected", *shown)
    assert len(text) < 300


@pytest.mark.parametrize(
    "known", [NUMBERS[:10], tuple(f"class {number}" for number in NUMBERS), ("cat", "dog")]
)
def test_names_that_are_there_stay(known):
    assert class_names(known) == known and len(IMAGENET) == 1000


def test_without_a_class_there_are_all(picture):
    shown = picture(count=2)
    assert shown.shape[0] == 10 * (PITCH + ABOVE) - pictures.GAP
    chosen = picture(count=2, classes=("0", "9"))
    assert np.array_equal(cell(shown, 0, 1), cell(chosen, 0, 1))
    assert np.array_equal(cell(shown, 9, 0), cell(chosen, 1, 0))
    titles = chosen[:ABOVE, :48], chosen[PITCH + ABOVE :][:ABOVE, :48]
    assert (titles[0] != pictures.GAP_GREY).any() and not np.array_equal(*titles)


@pytest.mark.parametrize("classes, count, rows, columns", [
    (("3",), 8, 2, 4),
    (("3", "5"), 8, 4, 4),
    (("3", "5", "7"), 8, 6, 4),
    ((), 8, 10, 8),
    (("3",), 7, 1, 7),
])  # fmt: skip
def test_a_picture_is_nearly_square_and_a_class_stays_together(
    picture, classes, count, rows, columns
):
    shown = picture(classes=classes, count=count)
    size = rows * (PITCH + ABOVE) - pictures.GAP, columns * PITCH - pictures.GAP
    assert shown.shape == (*size, 3)
    titles = [
        shown[row * (PITCH + ABOVE) : row * (PITCH + ABOVE) + ABOVE, :48] for row in range(rows)
    ]
    same = [np.array_equal(a, b) for a, b in zip(titles, titles[1:])]
    each = rows // (len(classes) or 10)
    assert same == [row % each != 0 for row in range(1, rows)]


def test_a_picture_is_in_the_runs_folder_with_its_settings_beside(run, tmp_path, monkeypatch):
    config = SampleConfig(ckpt=str(run), classes=("3",), count=2, num_steps=2, weights="model")
    out = sample(config)
    assert out.parent == run and sample(config) == out
    assert re.fullmatch(r"sample-0000007-model-ode-2-cfg-1\.5-[0-9a-f]{8}\.png", out.name)
    described = json.loads(out.with_suffix(".json").read_text())
    expected = {"weights": "model", "digest": load(run, weights="model").digest, "step": 7}
    expected |= {"classes": ["3"], "labels": [3], "count": 2, "cfg_scale": 1.5, "mode": "ode"}
    assert described | expected == described
    assert Path(described["ckpt"]) == (run / "checkpoints" / "0000007").resolve()
    assert line_of(out) == f"{out} (guidance 1.5, weights model of step 7)"
    assert sample(dataclasses.replace(config, cfg_scale=1.50000001)) != out
    monkeypatch.chdir(tmp_path)
    export(run / "checkpoints" / "0000007", "safetensors", tmp_path / "x.safetensors")
    alone = sample(SampleConfig(ckpt="x.safetensors", count=1, num_steps=1))
    assert alone.parent == Path() and alone.exists()
    assert line_of(alone) == f"{alone} (guidance 1.5, weights ema of step 7)"
    for path in run.glob("sample-*"):
        path.unlink()


def test_rows_and_columns_differ_and_the_noise_is_that_of_the_column_and_the_seed(picture):
    """Without guidance and with one step an image is noise - v(noise, 1, class)."""
    settings = {"classes": ("3", "5", "3"), "count": 2, "cfg_scale": 1.0}
    shown = picture(**settings)
    assert np.array_equal(picture(**settings), shown)
    assert not np.array_equal(picture(**settings, seed=1), shown)
    assert np.array_equal(cell(shown, 0, 0), cell(shown, 2, 0))
    assert not np.array_equal(cell(shown, 0, 0), cell(shown, 0, 1))
    assert not np.array_equal(cell(shown, 0, 0), cell(shown, 1, 0))
    levels = [cell(shown, row, column).astype(float) for row in (0, 1) for column in (0, 1)]
    same, other = np.abs(levels[0] - levels[2]).mean(), np.abs(levels[0] - levels[3]).mean()
    assert same < other / 2


@pytest.mark.parametrize("settings, message", [
    ({"count": 0}, "count is 0, expected at least 1"),
    ({"classes": ("10",)}, "class is '10', expected a number below 10"),
    ({"num_heads": 2}, "has 4 heads, expected 2"),
])  # fmt: skip
def test_wrong_settings_are_refused(picture, settings, message):
    refused(lambda: picture(**settings), message)


@pytest.mark.parametrize("call, config", [(sample, SampleConfig), (strip, StripConfig)])
@pytest.mark.parametrize("out, message", [
    ("folder.png", "out is .*folder.png, which is a folder, expected a file"),
    ("file/x.png", "out is .*x.png, but .*file is a file, expected a folder to write to"),
    ("x.jpg", "out is .*x.jpg, expected the name of a .png file"),
    ("s3:/x.png", "out is 's3:/x.png', expected a path"),
])  # fmt: skip
def test_where_nothing_can_be_written_nothing_is_sampled(
    call, config, out, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    refused(lambda: call(config(ckpt="absent", out=out)), message)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    refused(lambda: call(config(ckpt="absent", out="a/x.png")), r"but \. is read-only")


def test_a_strip_without_classes_has_those_of_the_dataset(tmp_path, monkeypatch):
    """A label table may have more rows, which training never met."""
    asked = []

    def images(sampler, index, labels, seed):
        asked.append(labels.tolist())
        return torch.zeros(len(index), 3, 16, 16, dtype=torch.uint8)

    monkeypatch.setattr("repa_fast.eval.sampling.ImageSampler.images", images)
    wide = checkpoints.run(tmp_path / "wide", num_classes=30)
    assert strip(StripConfig(ckpt=str(wide), count=12)) == wide / "strip.png"
    assert asked == [[*range(10), 0, 1]]
    described = json.loads((wide / "strip.json").read_text())
    assert (described["step"], described["weights"]) == ([7], "ema")
    trained = StripConfig(ckpt=str(wide / "checkpoints"), count=1, weights="model", cfg_scale=4)
    line = f"{wide / 'strip-model.png'} (guidance 4, weights model of step 7)"
    assert draw_strip(trained) == line


@pytest.mark.parametrize("argv, classes", [
    ([], ()),
    (["--class", "golden retriever"], ("golden retriever",)),
    (["--classes", "golden retriever", "3"], ("golden retriever", "3")),
])  # fmt: skip
def test_the_command_line_knows_classes(argv, classes, monkeypatch):
    seen = []

    def keep(config: SampleConfig) -> None:
        seen.append(config)

    monkeypatch.setattr("repa_fast.eval.sample.draw_sample", keep)
    assert cli.main(["sample", "--ckpt", "x", *argv, "--seed", "4"]) == 0
    assert seen == [SampleConfig(ckpt="x", classes=classes, seed=4)]


def test_the_command_says_where_the_picture_is_or_what_is_wrong_in_one_line(run, tmp_path, capsys):
    out = tmp_path / "three.png"
    argv = ["--class", "3", "--count", "2", "--num-steps", "2", "--out", str(out)]
    assert cli.main(["sample", "--ckpt", str(run), *argv]) == 0
    said = f"{out} (guidance 1.5, weights ema of step 7)"
    assert capsys.readouterr().out.strip() == said
    with Image.open(out) as image:
        assert image.size == (2 * PITCH - pictures.GAP, PITCH + ABOVE - pictures.GAP)
    assert cli.main(["sample", "--ckpt", str(tmp_path / "nothing")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("repa-fast: ") and "nothing does not exist" in line
