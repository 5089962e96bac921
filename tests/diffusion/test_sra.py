"""SRA's teacher times, losses and weights against loops and a table."""

import math

import pytest
import torch

from repa_fast.diffusion.alignment import (
    KINDS,
    sra_loss,
    teacher_steps,
    teacher_times,
)
from repa_fast.objective.self_alignment import align_weight
from repa_fast.testing import assert_within_budget, seeded
from tests.refusals import refused

EPOCH = 1_281_167


def pair(shape=(3, 4, 5), dtype=torch.float64):
    # differences on both sides of smooth L1's 0.05
    student = seeded(shape, seed=1, dtype=dtype)
    return student, student + seeded(shape, seed=2, dtype=dtype, std=0.07)


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b)


def smooth(difference):
    size = abs(difference)
    return size**2 / 0.1 if size < 0.05 else size - 0.025


def of_loops(student, teacher, kind):
    """One sample, (N, D), with Python numbers."""
    if kind.startswith("cos"):
        if kind == "cos":
            student, teacher = student.T, teacher.T
        cosines = [cosine(a, b) for a, b in zip(student.tolist(), teacher.tolist())]
        return 1 - sum(cosines) / len(cosines)
    of = {"sml1": smooth, "l1": abs, "l2": lambda x: x * x}[kind]
    pairs = list(zip(student.flatten().tolist(), teacher.flatten().tolist()))
    return sum(of(a - b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_has_the_loss_of_loops_over_it(kind):
    student, teacher = pair()
    losses = sra_loss(student, teacher, kind)
    expected = [of_loops(s, z, kind) for s, z in zip(student, teacher)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_it_is_computed_in_fp32_also_under_autocast(kind, dtype):
    student, teacher = pair((3, 64, 48), dtype)
    with torch.autocast("cpu", torch.bfloat16):
        losses = sra_loss(student, teacher, kind)
    assert losses.dtype == torch.float32
    oracle = sra_loss(student.double(), teacher.double(), kind)
    working = sra_loss(student.float(), teacher.float(), kind)
    assert_within_budget("losses", losses, oracle, working)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_states_have_no_loss_and_zeros_are_finite(kind):
    student = seeded((2, 3, 4), seed=1, dtype=torch.float64)
    assert sra_loss(student, student, kind).tolist() == pytest.approx([0, 0], abs=1e-15)
    zeros = torch.zeros(2, 3, 4, requires_grad=True)
    losses = sra_loss(zeros, zeros.detach(), kind)
    losses.sum().backward()
    assert losses.isfinite().all() and zeros.grad.isfinite().all()


@pytest.mark.parametrize(
    "t, u, t_max, expected",
    (
        (0.5, 0.0, 0.2, 0.5),
        (0.5, 0.5, 0.2, 0.4),
        (1.0, 1.0, 0.2, 0.8),
        (0.1, 1.0, 0.2, 0.0),
        (0.0, 0.3, 0.2, 0.0),
        (1.0, 1.0, 1.0, 0.0),
        (0.7, 0.9, 0.0, 0.7),
    ),
)
def test_times_of_the_teacher(t, u, t_max, expected):
    t, u = (torch.tensor([value], dtype=torch.float64) for value in (t, u))
    assert teacher_times(t, u, t_max).item() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    "t, u, t_max, expected",
    (
        (999, 0.0, 0.2, 999),
        (999, 0.9999, 0.2, 800),
        (999, 1.0, 0.2, 800),  # randint(0, 200) never gives 200
        (500, 0.5, 0.2, 400),
        (500, 0.5049, 0.2, 400),
        (500, 0.5051, 0.2, 399),
        (100, 0.9, 0.2, 1),
        (1, 0.0, 0.2, 1),
        (0, 0.0, 0.2, 1),
        (500, 0.999, 0.1, 401),
        (500, 0.999, 0.0019, 500),  # int(1.9) is one step, whose only offset is 0
        (999, 1.0, 1.0, 1),
    ),
)
def test_steps_of_the_teacher(t, u, t_max, expected):
    steps = teacher_steps(torch.tensor([t]), torch.tensor([u]), t_max)
    assert steps.dtype == torch.int64 and steps.item() == expected


def test_offsets_in_steps_are_equally_likely():
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    offsets = 900 - teacher_steps(torch.full((20_000,), 900), u, 0.2)
    assert offsets.bincount().tolist() == [100] * 200


def test_the_largest_fp32_draw_is_in_range():
    u = torch.tensor([1 - 2**-24, math.nextafter(1, 0)], dtype=torch.float32)
    for count in range(1, 1001):
        assert (999 - teacher_steps(torch.full((2,), 999), u, count / 1000 + 1e-9)).max() < count


TIMES, STEPS = torch.zeros(2), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "function, arguments, words",
    (
        (sra_loss, (*pair(), "cosine"), "'cosine', expected one of cos, cos-features, sml1"),
        (teacher_times, (TIMES, TIMES, -0.1), "t_max is -0.1, expected 0 to 1"),
        (teacher_times, (TIMES, TIMES, 1.1), "t_max is 1.1, expected 0 to 1"),
        (teacher_steps, (STEPS, TIMES, -0.1), "t_max is -0.1, expected 0.001 to 1"),
        (teacher_steps, (STEPS, TIMES, 1.1), "t_max is 1.1, expected 0.001 to 1"),
        (teacher_times, (TIMES, TIMES[:, None], 0.2), r"u has shape \(2, 1\), expected \(2,\)"),
        (teacher_steps, (STEPS, TIMES[:, None], 0.2), r"u has shape \(2, 1\), expected \(2,\)"),
        (teacher_steps, (TIMES, TIMES, 0.2), r"torch\.float32, expected an integer dtype"),
        (align_weight, ("l3", 0, 256, "flow"), "is 'l3', expected"),
        (align_weight, ("cos", 0, 256, "vp"), "is 'vp', expected"),
        (align_weight, ("cos", 0, 256, "ddpm"), "is 'cos', expected"),
        (align_weight, ("l2", 0, 256, "ddpm"), "is 'l2', expected"),
    ),
)
def test_what_does_not_fit_and_what_nobody_released_is_refused(function, arguments, words):
    refused(lambda: function(*arguments), words)


WEIGHTS = (
    # objective, resolution, epoch, weight: 2 or 0.4 times ten to the minus e
    ("flow", 256, 0, 0.2),
    ("flow", 256, 149, 0.2),
    ("flow", 256, 150, 0.19954001276),  # e = 1.001
    ("flow", 256, 649, 0.06324555320),  # e = 1.5
    ("flow", 256, 799, 0.04477442277),  # e = 1.65
    ("flow", 256, 1149, 0.02),  # e = 2
    ("flow", 512, 0, 0.2),
    ("flow", 512, 99, 0.2),
    ("flow", 512, 100, 0.19942518135),  # e = 1.00125
    ("flow", 512, 399, 0.08433930069),  # e = 1.375
    ("flow", 512, 899, 0.02),  # e = 2
    ("ddpm", 256, 0, 0.04),
    ("ddpm", 256, 149, 0.04),
    ("ddpm", 256, 799, 0.00895488455),  # e = 1.65
    ("ddpm", 256, 1149, 0.004),  # e = 2
)


@pytest.mark.parametrize("objective, resolution, epoch, weight", WEIGHTS)
def test_weights_of_whole_epochs(objective, resolution, epoch, weight):
    for images in (epoch * EPOCH, (epoch + 1) * EPOCH - 1):
        found = align_weight("sml1", images, resolution, objective)
        assert found == pytest.approx(weight, rel=1e-9)


@pytest.mark.parametrize("epoch", (0, 120, 150, 799))
def test_weights_of_other_kinds_and_resolutions(epoch):
    """Other distances decay as smooth L1, other resolutions as 256; cosines are constant."""

    def weight(kind, resolution):
        return align_weight(kind, epoch * EPOCH, resolution, "flow")

    for kind, resolution in (("l1", 256), ("l2", 256), ("sml1", 16), ("sml1", 128)):
        assert weight(kind, resolution) == weight("sml1", 256)
    for kind in ("cos", "cos-features"):
        assert weight(kind, 256) == weight(kind, 512) == 0.5
