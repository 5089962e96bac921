"""Features by their names, at the encoders' own sizes."""

import numpy as np
import pytest
import torch
from PIL import Image

from repa_fast import encoders
from repa_fast.distributed import World
from repa_fast.encoders.digits import DigitsJudge
from repa_fast.eval.inception import mean_patch_tokens
from repa_fast.eval.spaces import ScoreConfig, at_size, feature_space
from tests.analysis.analysing import write_npz
from tests.refusals import refused

ALONE = World(0, 1, torch.device("cpu"))


def pixels(side: int, count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(side)
    shape = (count, 3, side, side)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def by_pillow(images: torch.Tensor, side: int) -> torch.Tensor:
    """Bicubic with antialiasing, rounded to uint8."""
    shown = (Image.fromarray(of) for of in images.permute(0, 2, 3, 1).numpy())
    resized = [np.asarray(of.resize((side, side), Image.BICUBIC)) for of in shown]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("side", [64, 32, 24, 8])
def test_images_are_resized_as_pillow_does(side):
    images = pixels(side) // 2 + 64  # Pillow rounds and clips between rows and columns too
    found, expected = at_size(images, 16), by_pillow(images, 16)
    assert found.dtype == torch.uint8
    assert (found.int() - expected.int()).abs().max() <= 1


def test_images_of_the_size_are_left_as_they_are():
    images = pixels(16)
    assert at_size(images, 16) is images
    refused(lambda: at_size(pixels(16)[..., :9], 16), "images are 16x9, expected square ones")


@pytest.mark.parametrize("features", ["digits-vit", "digits-judge"])
@pytest.mark.parametrize("side", [16, 40])
def test_an_encoder_sees_images_at_a_size_that_it_takes(tmp_path, features, side):
    images = pixels(side)
    file = write_npz(tmp_path / "real.npz", images.permute(0, 2, 3, 1).numpy())
    space = feature_space(ScoreConfig(reference=str(file), features=features), ALONE)
    seen = images if side == 16 else at_size(images, 16)
    if features == "digits-vit":
        expected = mean_patch_tokens(encoders.load("digits-vit", 16, "cpu"), seen)
    else:
        expected = DigitsJudge().features(seen)
    found = space.features(images)
    assert torch.equal(found.pool, expected) and found.logits is None
    assert space.note == ("" if side == 16 else "images resized to 16 pixels")
    assert str(space) == (features if side == 16 else f"{features}; images resized to 16 pixels")


def test_the_judge_is_a_classifier_of_the_digits_alone(digits_dir, tmp_path):
    space = feature_space(ScoreConfig(dataset=digits_dir, features="digits-judge"), ALONE)
    assert space.classes == 10 and str(space) == "digits-judge; class accuracy by chance 0.1"
    images = pixels(16)
    assert torch.equal(space.features(images).logits, DigitsJudge()(images))


@pytest.mark.parametrize("of, words", [
    ({"features": "other"}, "features is 'other', expected one of inception, fitted, digits-judge"),
    ({"features": "digits-judge", "enc_weights": "x.pth"}, "enc_weights is x.pth, expected none"),
])  # fmt: skip
def test_other_features_are_refused(of, words):
    refused(lambda: feature_space(ScoreConfig(dataset="digits", **of), ALONE), words)
