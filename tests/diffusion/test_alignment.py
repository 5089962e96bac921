"""What losses of alignment have in common, and the cosine loss of several encoders."""

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


@every_loss
def test_gradients_are_finite_differences(loss):
    projection, target = pair((2, 3, 4))
    assert torch.autograd.gradcheck(lambda p: loss(p, target), (projection.requires_grad_(),))


@every_loss
@pytest.mark.parametrize("shape", ((3, 4, 6), (3, 5, 5), (12, 5)))
def test_a_target_of_another_shape_is_named(loss, shape):
    message = refused(lambda: loss(torch.ones(3, 4, 5), torch.ones(shape)))
    assert str(shape) in message and "expected (3, 4, 5)" in message


def test_each_encoder_has_one_cosine_loss_per_sample_the_official_loop_over_patches():
    projections, targets = zip(pair((3, 4, 5)), pair((3, 4, 8)))
    losses = cosine_losses(projections, targets)
    assert [loss.shape for loss in losses] == [(3,), (3,)] and cosine_losses([], []) == []
    for loss, projection, target in zip(losses, projections, targets):
        for sample, p, z in zip(loss.tolist(), projection, target):
            cosines = [(a / a.norm()) @ (b / b.norm()) for a, b in zip(p, z)]
            assert sample == pytest.approx(-float(sum(cosines)) / len(cosines), rel=1e-12)


@pytest.mark.parametrize("counts", ((1, 2), (2, 1), (0, 1), (2, 0)))
def test_counts_that_differ_are_named(counts):
    given = ([pair()[0]] * count for count in counts)
    refused(partial(cosine_losses, *given), *map(str, counts))
