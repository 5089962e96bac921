"""SRA's teacher times, losses and weights against loops and a table."""

import math

import pytest
import torch

from repa_fast.diffusion.alignment import KINDS, sra_loss, teacher_steps, teacher_times
from repa_fast.objective.self_alignment import align_weight
from repa_fast.testing import assert_within_budget, seeded
from tests.refusals import refused

EPOCH = 1_281_167


every_kind = pytest.mark.parametrize("kind", KINDS)


def pair(shape=(3, 4, 5), dtype=torch.float64):
    """Hidden states, with differences on both sides of smooth L1's 0.05."""
    student = seeded(shape, seed=1, dtype=dtype)
    return student, student + seeded(shape, seed=2, dtype=dtype, std=0.07)


def plain(student, teacher, kind):
    """The loss of one sample (N, D), by its formula."""
    if kind.startswith("cos"):
        over = 0 if kind == "cos" else 1
        norms = student.square().sum(over) * teacher.square().sum(over)
        return 1 - ((student * teacher).sum(over) / norms.sqrt()).mean()
    size = (student - teacher).abs()
    smooth = torch.where(size < 0.05, size**2 / 0.1, size - 0.025)
    return {"sml1": smooth, "l1": size, "l2": size**2}[kind].mean()


@every_kind
def test_a_sample_has_the_loss_of_its_formula_and_none_where_states_are_equal(kind):
    student, teacher = pair()
    expected = torch.stack([plain(s, z, kind) for s, z in zip(student, teacher)])
    torch.testing.assert_close(sra_loss(student, teacher, kind), expected, rtol=1e-10, atol=0)
    assert sra_loss(student, student, kind).tolist() == pytest.approx([0] * 3, abs=1e-15)


@every_kind
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_it_is_computed_in_fp32_also_under_autocast(kind, dtype):
    student, teacher = pair((3, 64, 48), dtype)
    with torch.autocast("cpu", torch.bfloat16):
        losses = sra_loss(student, teacher, kind)
    assert losses.dtype == torch.float32
    oracle, working = (
        sra_loss(student.to(work), teacher.to(work), kind)
        for work in (torch.float64, torch.float32)
    )
    assert_within_budget("losses", losses, oracle, working)


@every_kind
def test_zeros_have_a_finite_loss_and_gradient(kind):
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


EXPONENTS = (
    ("flow", 256, {0: 1, 149: 1, 150: 1.001, 649: 1.5, 799: 1.65, 1149: 2}),
    ("flow", 512, {0: 1, 99: 1, 100: 1.00125, 399: 1.375, 899: 2}),
    ("ddpm", 256, {0: 1, 149: 1, 799: 1.65, 1149: 2}),
)
"""Objective, resolution, and epoch -> e of the weight, which is 2 or 0.4 times ten to the -e."""


@pytest.mark.parametrize("objective, resolution, exponents", EXPONENTS)
def test_weights_of_whole_epochs(objective, resolution, exponents):
    for epoch, exponent in exponents.items():
        expected = {"flow": 2, "ddpm": 0.4}[objective] * 10**-exponent
        for images in (epoch * EPOCH, (epoch + 1) * EPOCH - 1):
            found = align_weight("sml1", images, resolution, objective)
            assert found == pytest.approx(expected, rel=1e-9), epoch


@pytest.mark.parametrize("epoch", (0, 120, 150, 799))
def test_other_distances_decay_as_smooth_l1_other_resolutions_as_256_and_cosines_do_not(epoch):
    def weight(kind, resolution):
        return align_weight(kind, epoch * EPOCH, resolution, "flow")

    for kind, resolution in (("l1", 256), ("l2", 256), ("sml1", 16), ("sml1", 128)):
        assert weight(kind, resolution) == weight("sml1", 256)
    for kind in ("cos", "cos-features"):
        assert weight(kind, 256) == weight(kind, 512) == 0.5
