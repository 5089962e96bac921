"""The packaged digits nets: format, freezing, and the worth of their features on held-out data."""

import functools
from importlib import resources

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from repa_fast import encoders
from repa_fast.data.digits import digit_images
from repa_fast.encoders.digits import DigitsJudge, DigitsViT
from tests.refusals import refused

PROBE_FLOOR = 0.97
JUDGE_FLOOR = 0.985
MAX_MEAN_COSINE = 0.2
MIN_EFFECTIVE_RANK = 20.0
MAX_BYTES = 1_000_000


@functools.cache
def load(split):
    """Return images uint8 (N, 3, 16, 16) and labels int64 (N,)."""
    images, labels = digit_images(split)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


@pytest.fixture(scope="module")
def teacher():
    return encoders.load("digits-vit", 16, "cpu")


@pytest.fixture(scope="module")
def judge():
    return DigitsJudge()


@pytest.fixture(scope="module")
def val_tokens(teacher):
    return teacher(load("val")[0])


def test_splits_are_stratified_and_disjoint():
    (train, train_labels), (val, val_labels) = digit_images("train"), digit_images("val")
    assert train.shape == (1500, 16, 16, 3) and val.shape == (297, 16, 16, 3)
    assert train.dtype == val.dtype == np.uint8 and train.max() == 255 and train.min() == 0
    assert train_labels.dtype == val_labels.dtype == np.int64
    shares = [np.bincount(y, minlength=10) / len(y) for y in (train_labels, val_labels)]
    assert np.abs(shares[0] - shares[1]).max() < 1 / 297
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in val}
    assert np.array_equal(digit_images("val")[0], val)
    refused(lambda: digit_images("test"), "expected 'train' or 'val', got 'test'")


def test_nets_are_small_and_frozen(teacher, judge):
    for name in ("digits-vit", "digits-judge"):
        file = resources.files("repa_fast").joinpath("encoders", "weights", f"{name}.safetensors")
        assert len(file.read_bytes()) < MAX_BYTES
    for net in (teacher, judge, DigitsViT(pretrained=False), DigitsJudge(pretrained=False)):
        assert not any(module.training for module in net.modules())
        assert not any(p.requires_grad for p in net.parameters())
        assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_shapes_are_those_the_registry_promises(teacher, judge):
    images, spec = load("val")[0][:5], encoders.spec("digits-vit")
    tokens, features, logits = teacher(images), judge.features(images), judge(images)
    assert tokens.shape == (5, teacher.num_tokens(16), teacher.width) == (5, 16, 96)
    assert tokens.shape == (5, spec.num_tokens(16), spec.width)
    assert len(teacher.vit.blocks) == spec.depth
    assert teacher.vit.patch_embed.patch_size == (spec.patch_size,) * 2
    assert teacher.vit.num_prefix_tokens == spec.prefix
    assert features.shape == (5, judge.width) and logits.shape == (5, 10)
    assert {tokens.dtype, features.dtype, logits.dtype} == {torch.float32}


def test_another_resolution_and_wrong_images_are_refused(teacher, judge):
    for resolution in (8, 15, 32, 256):
        call = functools.partial(teacher.num_tokens, resolution)
        refused(call, f"expected 16, got {resolution}")
    shapes = ((2, 3, 32, 32), (2, 1, 16, 16), (3, 16, 16))
    wrong = [torch.zeros(shape, dtype=torch.uint8) for shape in shapes]
    for images in (*wrong, torch.zeros(2, 3, 16, 16)):
        for forward in (teacher, judge, judge.features):
            refused(functools.partial(forward, images), "expected uint8")


def test_tokens_keep_row_major_order(teacher):
    images = load("val")[0][:64]
    changed = images.clone()
    changed[:, :, 4:8, 8:12] ^= 255  # row 1, column 2 of 4x4 patches
    moved = (teacher(changed) - teacher(images)).norm(dim=-1).mean(dim=0)
    assert moved.argmax().item() == 1 * 4 + 2


def test_teacher_linear_probe(teacher, val_tokens):
    images, labels = load("train")
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(teacher(images).mean(dim=1).numpy(), labels)
    assert probe.score(val_tokens.mean(dim=1).numpy(), load("val")[1]) >= PROBE_FLOOR


def test_judge_accuracy(judge):
    images, labels = load("val")
    assert (judge(images).argmax(dim=-1).numpy() == labels).mean() >= JUDGE_FLOOR


def test_tokens_are_not_collapsed(val_tokens):
    tokens = val_tokens.flatten(0, 1)  # (297 * 16, D)
    unit = F.normalize(tokens, dim=-1)
    count = len(unit)
    off_diagonal = (unit.sum(dim=0).square().sum() - count) / (count * (count - 1))
    assert off_diagonal.abs().item() < MAX_MEAN_COSINE
    share = torch.linalg.eigvalsh(torch.cov(tokens.T)).clamp_min(1e-12)
    share = share / share.sum()
    assert (-(share * share.log()).sum()).exp().item() > MIN_EFFECTIVE_RANK


def test_nets_differ(teacher, judge):
    shared, other = teacher.vit.state_dict(), judge.vit.state_dict()
    assert set(shared) < set(other)
    for key in (key for key in shared if key.endswith("weight") and shared[key].ndim > 1):
        cosine = F.cosine_similarity(shared[key].flatten(), other[key].flatten(), dim=0)
        assert cosine.abs().item() < 0.5, key
