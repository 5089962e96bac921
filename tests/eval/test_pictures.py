"""Grids of images; strip, sweep and pca on a run that has learnt nothing."""

import json
import resource

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from repa_fast.analysis import pca as pca_module
from repa_fast.analysis.pca import PcaConfig, colours, pca
from repa_fast.configs.sampler import SamplerConfig
from repa_fast.eval import pictures
from repa_fast.eval.generate import GenerateConfig, generate
from repa_fast.eval.load import load
from repa_fast.eval.metrics import EvalConfig, evaluate
from repa_fast.eval.pictures import GAP, GAP_GREY, TITLE_PIXELS
from repa_fast.eval.sample import StripConfig, strip
from repa_fast.eval.sampling import ImageSampler
from repa_fast.eval.sweep import SweepConfig, sweep
from tests.refusals import refused

SIDE = 48


def numbered(count: int, side: int) -> torch.Tensor:
    """Images (count, 3, side, side) whose every pixel and channel has its own value."""
    return torch.randint(
        1, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.manual_seed(0)
    )


@pytest.mark.parametrize("side, factor", [(16, 3), (24, 2), (48, 1), (64, 1)])
@pytest.mark.parametrize("count, columns, rows", [(6, 3, 2), (5, 3, 2), (3, 1, 3)])
def test_a_grid_shows_the_images_row_by_row(side, factor, count, columns, rows):
    images = numbered(count, side)
    picture = pictures.arrange(images, columns)
    cell, pitch = side * factor, side * factor + GAP
    expected = np.full((rows * pitch, columns * pitch, 3), GAP_GREY, np.uint8)
    for index in range(count):
        top, left = index // columns * pitch, index % columns * pitch
        enlarged = images[index].permute(1, 2, 0).numpy().repeat(factor, 0).repeat(factor, 1)
        expected[top : top + cell, left : left + cell] = enlarged
    assert picture.dtype == np.uint8 and GAP > 0
    assert np.array_equal(picture, expected[:-GAP, :-GAP])


def test_titles_stand_above_their_images_and_change_nothing_else():
    images = numbered(5, 48)
    plain, titled = pictures.arrange(images, 3), pictures.arrange(images, 3, ["a title"] * 5)
    above, pitch = TITLE_PIXELS, 48 + GAP
    for row in range(2):
        rows = titled[row * (pitch + above) :]
        assert np.array_equal(rows[above : above + 48], plain[row * pitch : row * pitch + 48])
        for column in range(3):
            title = rows[:above, column * pitch : column * pitch + 48]
            assert (title != GAP_GREY).any() == (3 * row + column < 5)
    long = pictures.arrange(images[:2], 2, ["W" * 50 + "\n" + "W" * 50, ""])
    assert (long[:above, pitch:] == GAP_GREY).all()


@pytest.mark.parametrize("save, content", [
    (pictures.save_png, np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)),
    (pictures.save_figure, Figure()),
])  # fmt: skip
def test_a_picture_that_cannot_be_written_leaves_the_older_one(save, content, tmp_path):
    there = tmp_path / "x.png"
    there.write_bytes(b"older")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save(content, there)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert there.read_bytes() == b"older" and [*tmp_path.iterdir()] == [there]
    save(content, there)
    assert there.read_bytes().startswith(b"\x89PNG")


def tile(picture, row, column, side=SIDE):
    top = row * (side + TITLE_PIXELS + GAP) + TITLE_PIXELS
    left = column * (side + GAP)
    return picture[top : top + side, left : left + side]


def test_a_strip_has_a_row_per_image_and_a_column_per_checkpoint(run):
    config = StripConfig(ckpt=str(run), classes=("3", "5", "3"), num_steps=2)
    path = strip(config)
    assert path == run / "strip.png"
    picture = np.asarray(Image.open(path))
    labels = np.array([3, 5, 3])
    for column, step in enumerate((3, 7)):
        loaded = load(run / "checkpoints" / f"{step:07d}")
        sampler = ImageSampler(loaded, SamplerConfig(num_steps=2), torch.device("cpu"))
        images = sampler.images(np.arange(3), labels, 0).permute(0, 2, 3, 1).numpy()
        for row, image in enumerate(images):
            assert np.array_equal(tile(picture, row, column)[::3, ::3], image)
    assert not np.array_equal(tile(picture, 0, 0), tile(picture, 0, 1))


@pytest.mark.parametrize("options, count, columns", [
    (range(1, 101), 100, 10),
    (range(4, 101, 4), 100, 12),  # 8 rows; 12 rows of 8 are as near
    (range(3, 101, 3), 100, 9),
    ((1, 7), 7, 7),
])  # fmt: skip
def test_the_squarest_grid_is_chosen_and_the_wider_of_two(options, count, columns):
    assert pictures.squarest(options, count) == columns


def test_a_sweep_s_points_are_those_of_generate_and_eval(run, digits_dir, tmp_path):
    settings = {"num_fid_samples": 192, "num_steps": 2, "sample_dir": str(tmp_path / "s")}
    judged = {"dataset": digits_dir, "split": "val", "features": "digits-judge", "kid_subsets": 5}
    config = SweepConfig(ckpt=str(run), all_steps=True, cfg_scales=(1.0, 3.0), **settings, **judged)
    written = sweep(config)
    results = json.loads((tmp_path / "s" / "sweep.json").read_text())
    points = results["points"]
    assert [(p["step"], p["cfg_scale"]) for p in points] == [(3, 1), (3, 3), (7, 1), (7, 3)]
    chosen = GenerateConfig(ckpt=str(run / "checkpoints" / "0000007"), cfg_scale=3.0, **settings)
    samples = generate(chosen)
    alone = tmp_path / "alone.json"
    evaluate(EvalConfig(samples=str(samples), out=str(alone), **judged))
    expected = json.loads(alone.read_text())["scores"]
    assert {name: points[3][name] for name in expected} == pytest.approx(expected)
    assert len({p["Frechet distance"] for p in points}) == 4
    assert set(expected) - set(points[3]) == set() and 0 <= expected["class accuracy"] <= 1
    assert results["classifier"] == {"classes": 10} and results["refused"] == {}
    assert "class accuracy by chance 0.1" in written
    assert "Frechet distance" in written and (tmp_path / "s" / "sweep.md").exists()
    with Image.open(tmp_path / "s" / "sweep.png") as picture:
        assert len(picture.getcolors(1 << 20)) > 10


def test_colours_are_the_three_main_directions():
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn((8, 8), generator=generator, dtype=torch.float64))
    strength = torch.tensor([9.0, 5.0, 3.0, 0.1, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    hidden = torch.randn((6, 16, 8), generator=generator, dtype=torch.float64) * strength
    found = colours((hidden @ basis + 7).float())
    assert found.shape == (6, 3, 4, 4) and found.dtype == torch.uint8
    along = hidden.flatten(0, 1)[:, :3]
    levels = found.permute(0, 2, 3, 1).reshape(-1, 3).double()
    for direction in range(3):
        inside = (levels[:, direction] > 0) & (levels[:, direction] < 255)
        pair = torch.stack([levels[inside, direction], along[inside, direction]])
        assert abs(torch.corrcoef(pair)[0, 1]) > 0.9


def test_pca_writes_a_picture_for_each_image(run, loaded, digits_dir, tmp_path):
    config = PcaConfig(
        ckpt=str(run), data_dir=digits_dir, rows=(0, 5), times=(0.1, 0.6), out=str(tmp_path)
    )
    files = pca(config).splitlines()
    assert [name.rpartition("/")[2] for name in files] == ["pca-0.png", "pca-5.png"]
    side = pca_module.SHOWN_SIDE
    layers = len(loaded.model.blocks)
    for name in files:
        picture = np.asarray(Image.open(name))
        height = layers * (side + TITLE_PIXELS + GAP) - GAP
        assert picture.shape == (height, 2 * (side + GAP) - GAP, 3)
    assert (tmp_path / "image-5.png").exists()


def test_what_is_not_there_is_refused(run, digits_dir, tmp_path):
    no_run = StripConfig(ckpt=str(tmp_path))
    refused(lambda: strip(no_run), "neither a complete checkpoint nor a run that has one")
    no_score = SweepConfig(
        ckpt=str(run), dataset=digits_dir, split="val", features="digits-judge",
        num_fid_samples=4, num_steps=1, sample_dir=str(tmp_path), plotted="FID",
    )  # fmt: skip
    refused(lambda: sweep(no_score), "plotted is 'FID', expected one of class accuracy, precision")
    no_score.plotted = "Frechet distance"
    refused(lambda: sweep(no_score), "plotted: Frechet distance is refused, 4 images, .* 192")
    no_row = PcaConfig(ckpt=str(run), data_dir=digits_dir, rows=(297,))
    refused(lambda: pca(no_row), r"row is 297, expected 0\.\.296")
