"""A picture of samples: which class a name means, and what is in the picture."""

import numpy as np
import pytest
import tyro
from PIL import Image

from repa_fast import cli
from repa_fast.eval import pictures
from repa_fast.eval.sample import SampleConfig, class_index, class_names, sample
from tests.eval import checkpoints

NAMES = ("tench, Tinca tinca", "Red Fox, Vulpes", "arctic fox", "crane", "ox", "crane", "12")
PITCH = 3 * 16 + pictures.GAP  # digits are shown three times as large
ABOVE = pictures.TITLE_PIXELS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return checkpoints.run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def picture(run, tmp_path):
    """(settings) -> the picture, uint8 (H, W, 3)."""

    def make(**settings) -> np.ndarray:
        config = SampleConfig(
            ckpt=str(run), out=str(tmp_path / "deep" / "x.png"), num_steps=2, **settings
        )
        path = sample(config)
        assert path == tmp_path / "deep" / "x.png"
        with Image.open(path) as image:
            assert image.format == "PNG"
            return np.asarray(image)

    return make


def cell(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    """One image of the picture, with its three-fold enlargement."""
    top, left = row * (PITCH + ABOVE) + ABOVE, column * PITCH
    return picture[top : top + 48, left : left + 48]


@pytest.mark.parametrize(
    "wanted, expected",
    [
        ("0", 0),  # a number
        ("6", 6),
        ("tench", 0),  # a synonym
        ("Tinca tinca", 0),
        ("TINCA TINCA", 0),
        ("red fox", 1),
        ("Arctic Fox", 2),
        ("vulp", 1),  # a part
        ("tin", 0),
        ("ox", 4),  # a name before a part of others
        ("12", 6),  # a name before a number; there is no class 12
    ],
)
def test_a_class_is_a_number_a_name_a_synonym_or_a_part(wanted, expected):
    assert class_index(wanted, NAMES) == expected


def test_a_name_of_digits_wins_over_the_number():
    assert [class_index(name, ("1", "0")) for name in "01"] == [1, 0]


@pytest.mark.parametrize(
    "wanted, shown",
    [
        ("fox", ["1 (Red Fox, Vulpes)", "2 (arctic fox)"]),  # a part of two
        ("crane", ["3 (crane)", "5 (crane)"]),  # the name of two
        ("wolf", ["0 (tench", "4 (ox)"]),  # of none: some that there are
        ("7", ["expected a number below 7"]),
        ("-1", ["expected a number below 7"]),
        ("", ["expected a number below 7 or a name"]),
    ],
)
def test_an_unknown_or_ambiguous_class_is_refused_with_some_that_there_are(wanted, shown):
    with pytest.raises(ValueError, match=f"class is {wanted!r}, expected") as raised:
        class_index(wanted, NAMES)
    assert [part for part in shown if part not in str(raised.value)] == []


def test_long_lists_of_classes_are_cut():
    with pytest.raises(ValueError) as raised:
        class_index("class", [f"class {number}" for number in range(1000)])
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    "wanted, index",
    [("golden retriever", 207), ("Tinca tinca", 0), ("daisy", 985), ("toilet tissue", 999)],
)
def test_thousand_numbered_classes_are_imagenets(wanted, index):
    names = class_names([str(number) for number in range(1000)])
    assert len(names) == 1000 and class_index(wanted, names) == index


def test_two_classes_of_imagenet_are_cranes():
    names = class_names([str(number) for number in range(1000)])
    with pytest.raises(ValueError, match=r"134 \(crane\), 517 \(crane\)"):
        class_index("crane", names)


@pytest.mark.parametrize(
    "known", [tuple("0123456789"), tuple(f"class {i}" for i in range(1000)), ("cat", "dog")]
)
def test_names_that_are_there_stay(known):
    assert class_names(known) == known


@pytest.mark.parametrize("classes, count", [(("3",), 1), (("3", "5"), 4), (("1", "2", "1"), 2)])
def test_there_is_a_row_for_each_class(picture, classes, count):
    shape = picture(classes=classes, count=count).shape
    rows = len(classes)
    assert shape == (rows * (PITCH + ABOVE) - pictures.GAP, count * PITCH - pictures.GAP, 3)


def test_without_a_class_there_are_all(picture):
    shown = picture(count=2)
    assert shown.shape[0] == 10 * (PITCH + ABOVE) - pictures.GAP
    chosen = picture(count=2, classes=("0", "9"))
    assert np.array_equal(cell(shown, 0, 1), cell(chosen, 0, 1))
    assert np.array_equal(cell(shown, 9, 0), cell(chosen, 1, 0))


def test_pictures_repeat_with_the_seed(picture):
    first = picture(classes=("3",), count=2)
    assert np.array_equal(picture(classes=("3",), count=2), first)
    assert not np.array_equal(picture(classes=("3",), count=2, seed=1), first)


def test_rows_and_columns_differ_and_the_noise_is_that_of_the_column(picture):
    """Without guidance and with one step an image is noise - v(noise, 1, class)."""
    shown = picture(classes=("3", "5", "3"), count=2, cfg_scale=1.0)
    assert np.array_equal(cell(shown, 0, 0), cell(shown, 2, 0))
    assert not np.array_equal(cell(shown, 0, 0), cell(shown, 0, 1))
    assert not np.array_equal(cell(shown, 0, 0), cell(shown, 1, 0))
    levels = [cell(shown, row, column).astype(float) for row in (0, 1) for column in (0, 1)]
    same, other = np.abs(levels[0] - levels[2]).mean(), np.abs(levels[0] - levels[3]).mean()
    assert same < other / 2


def test_titles_name_the_classes(picture):
    three, five = (picture(classes=(name,), count=1)[:ABOVE] for name in "35")
    assert (three != pictures.GAP_GREY).any() and not np.array_equal(three, five)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"count": 0}, "count is 0, expected at least 1"),
        ({"classes": ("10",)}, "class is '10', expected a number below 10"),
        ({"num_heads": 2}, "has 4 heads, expected 2"),
    ],
)
def test_wrong_settings_are_refused(picture, settings, message):
    with pytest.raises(ValueError, match=message):
        picture(**settings)


@pytest.mark.parametrize(
    "argv, classes",
    [
        ([], ()),
        (["--class", "golden retriever"], ("golden retriever",)),
        (["--classes", "golden retriever", "3"], ("golden retriever", "3")),
    ],
)
def test_the_command_line_knows_classes(argv, classes, monkeypatch):
    seen = []

    def keep(config: SampleConfig) -> None:
        seen.append(config)

    monkeypatch.setattr("repa_fast.eval.sample.sample", keep)
    assert cli.main(["sample", "--ckpt", "x", *argv, "--seed", "4"]) == 0
    assert seen == [SampleConfig(ckpt="x", classes=classes, seed=4)]


def test_the_command_writes_the_picture_and_says_where(run, tmp_path, capsys):
    out = tmp_path / "three.png"
    argv = ["--class", "3", "--count", "2", "--num-steps", "2", "--out", str(out)]
    assert cli.main(["sample", "--ckpt", str(run), *argv]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as image:
        assert image.size == (2 * PITCH - pictures.GAP, PITCH + ABOVE - pictures.GAP)


def test_errors_end_in_one_line(run, tmp_path, capsys):
    assert cli.main(["sample", "--ckpt", str(tmp_path / "nothing")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("repa-fast: ") and "nothing does not exist" in line


def test_every_setting_has_a_word_of_help(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(SampleConfig, args=["--help"])
    text = capsys.readouterr().out
    assert "--classes" in text and "--cfg-scale" in text and "--origin" in text
