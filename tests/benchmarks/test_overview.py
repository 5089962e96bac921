"""What the README says is what the rows say, and its picture is drawn from them."""

import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks.paper import overview

README = (overview.ROOT / "README.md").read_text()


def test_the_steps_of_the_readme_are_the_rows_medians():
    rows = dict(zip(overview.SHOWN, overview.steps(), strict=True))
    assert {row["commit"] for row in rows.values()} == {overview.SESSION}
    assert {row["device"] for row in rows.values()} == {"NVIDIA H200"}
    ms = {name: row["ms_p50"] for name, row in rows.items()}
    line = next(line for line in README.splitlines() if line.startswith("| training step"))
    theirs, ours, ratio = map(float, re.findall(r"\d+\.\d+", line))
    assert (theirs, ours) == (round(ms["released"], 1), round(ms["graph"], 1))
    assert ratio == round(ms["released"] / ms["graph"], 2)
    before = overview.rows_of("0a11b3e")
    line = next(line for line in README.splitlines() if "tuned PyTorch with torch.compile" in line)
    tuned, ours, ratio = map(float, re.findall(r"\d+\.\d+", line))
    rivals = [before[name]["ms_p50"] for name in ("compiled", "graph")]
    assert [tuned, ours] == [round(each, 1) for each in rivals]
    assert ratio == round(rivals[0] / rivals[1], 2)
    said = re.search(r"(\d+\.\d) for REPA's released code and (\d+\.\d) to (\d+\.\d) ", README)
    named = ("released", "joint-adaln", "one-pass")
    assert [float(of) for of in said.groups()] == [round(ms[name], 1) for name in named]


@pytest.mark.usefixtures("heavy")
def test_the_picture_is_drawn(tmp_path):
    overview.draw(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_the_readme_shows_the_picture():
    assert f"({overview.PICTURE.relative_to(overview.ROOT)})" in README


def test_the_readme_is_short_and_has_one_picture():
    words = README.partition("\n## Citation")[0].split()
    assert len(words) <= 900 and README.count("![") == 1


def test_rates_of_readers_are_those_of_their_report():
    report = Path(overview.ROOT / "benchmarks/results/cpu/2026-11-21_data/report.md").read_text()
    line = next(line for line in README.splitlines() if "reading and decoding" in line)
    numbers = [float(of.replace(",", "")) for of in re.findall(r"([\d,]+) images/s", line)]
    rates = [float(of.replace(",", "")) for of in re.findall(r"(?<=\| )[\d,]+(?= \|)", report)]
    assert all(any(abs(rate / said - 1) < 0.01 for rate in rates) for said in numbers), report
