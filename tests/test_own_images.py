"""The four commands of the README, from a folder of images to a grid and a figure."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lance")
pytest.importorskip("tyro")

from repa_fast import cli

ROOT = Path(__file__).parents[1]
COLOURS = {"red": (220, 40, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "grey": (128,) * 3}
SHORTER = {
    "prepare": (),
    "train": ("--max-train-steps=10", "--num-steps=2", "--depth=2", "--warmup-steps=0"),
    "generate": ("--num-steps=2", "--num-fid-samples=80"),
    "eval": (),
}
"""Flags at the end of each command: a test has seconds, not minutes."""


def commands(page: str) -> list[list[str]]:
    """Return the words of the first block of commands under "Your own images" of a page."""
    text = (ROOT / page).read_text().partition("our own images\n")[2]
    block = re.search(r"```\n([^`]*)```|\n((?:    [^\n]*\n)+)", text)
    lines = (block[1] or block[2]).strip().splitlines()
    return [shlex.split(line) for line in lines]


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """Forty images in four classes by colour, of other sizes than the model's."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):
            pixels = rng.normal(colour, 30, (70, 80, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.jpg")


@pytest.mark.usefixtures("heavy", "photographs")
def test_the_readme_s_four_commands_make_a_grid_and_a_figure(tmp_path, capsys):
    found = commands("README.md")
    assert len(found) == 4
    for words in found:
        program, *words = words
        assert program == "repa-fast"
        assert cli.main([*words, *SHORTER[words[0]]]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "class accuracy" in printed and "Frechet distance" in printed
    run = tmp_path / "exps" / "photos"
    with Image.open(run / "samples.png") as grid:
        assert grid.size == (
            12 * 68 - 4,
            8 * 68 - 4,
        )  # three columns a class
    config = json.loads((run / "args.json").read_text())
    assert (config["resolution"], config["num_classes"], config["ema_warmup"]) == (32, 4, True)
    assert len(list((run / "generated").glob("*.npz"))) == 1


def test_the_page_has_the_readme_s_commands():
    assert commands("docs/own-images.md") == commands("README.md")
