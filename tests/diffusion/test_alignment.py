"""What the losses of alignment have in common, and the cosine loss of several encoders."""

from functools import partial

import pytest
import torch

from repa_fast.diffusion.alignment import KINDS, cosine_losses, nt_xent, sra_loss
from repa_fast.testing import seeded
from tests.refusals import refused


def of_one_encoder(projection, target):
    return cosine_losses([projection], [target])[0]


LOSSES = {f"sra {kind}": partial(sra_loss, kind=kind) for kind in KINDS}
LOSSES |= {"nt-xent": partial(nt_xent, chunk=2)}
LOSSES |= {"nt-xent batch": partial(nt_xent, temperature=0.5, negatives="batch", chunk=2)}
LOSSES |= {"cos": of_one_encoder}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
own_losses = pytest.mark.parametrize("loss", list(LOSSES.values())[:-1], ids=list(LOSSES)[:-1])


def pair(shape=(3, 4, 5), dtype=torch.float64):
    """Projections and targets, with differences on both sides of smooth L1's 0.05."""
    projection = seeded(shape, seed=1, dtype=dtype)
    return projection, projection + seeded(shape, seed=2, dtype=dtype, std=0.07)


@every_loss
def test_targets_receive_no_gradient(loss):
    projection, target = (tensor.requires_grad_() for tensor in pair())
    losses = loss(projection, target)
    losses.sum().backward()
    assert losses.shape == (3,) and target.grad is None and projection.grad.any()


@own_losses
def test_gradients_are_finite_differences(loss):
    projection, target = pair((2, 3, 4))
    assert torch.autograd.gradcheck(lambda p: loss(p, target), (projection.requires_grad_(),))


@every_loss
@pytest.mark.parametrize("shape", ((3, 4, 6), (3, 5, 5), (12, 5)))
def test_a_target_of_another_shape_is_named(loss, shape):
    message = refused(lambda: loss(torch.ones(3, 4, 5), torch.ones(shape)))
    assert str(shape) in message and "expected (3, 4, 5)" in message


def pairs():
    """Of two encoders."""
    shapes = [(3, 4, width) for width in (5, 8)]
    return tuple(
        [seeded(shape, seed=seed + k, dtype=torch.float64) for k, shape in enumerate(shapes)]
        for seed in (1, 11)
    )


def test_the_mean_of_cosine_losses_is_the_official_loop_over_encoders_samples_and_patches():
    projections, targets = pairs()
    total = 0.0
    for p, z in zip(projections, targets):
        for p_sample, z_sample in zip(p, z):
            cosines = [(a / a.norm()) @ (b / b.norm()) for a, b in zip(p_sample, z_sample)]
            total -= sum(float(c) for c in cosines) / len(cosines)
    losses = cosine_losses(projections, targets)
    assert torch.stack(losses).mean().item() == pytest.approx(total / 6, rel=1e-12)


def test_each_encoder_has_one_loss_per_sample():
    projections, targets = pairs()
    losses = cosine_losses(projections, targets)
    assert [loss.shape for loss in losses] == [(3,), (3,)]
    for k in range(2):
        assert torch.equal(losses[k], of_one_encoder(projections[k], targets[k]))
    assert cosine_losses([], []) == []


@pytest.mark.parametrize("counts", ((1, 2), (2, 1), (0, 1), (2, 0)))
def test_counts_that_differ_are_named(counts):
    projections, targets = pairs()
    call = partial(cosine_losses, projections[: counts[0]], targets[: counts[1]])
    refused(call, *map(str, counts))
