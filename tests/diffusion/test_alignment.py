import pytest
import torch

from repa_fast.diffusion.alignment import cosine_losses
from repa_fast.testing import seeded

WIDTHS = (5, 8)


def pairs():
    shapes = [(3, 4, width) for width in WIDTHS]
    return tuple(
        [seeded(shape, seed=seed + k, dtype=torch.float64) for k, shape in enumerate(shapes)]
        for seed in (1, 11)
    )


def test_their_mean_is_the_official_loop_over_encoders_samples_and_patches():
    projections, targets = pairs()
    total = 0.0
    for p, z in zip(projections, targets):
        for p_sample, z_sample in zip(p, z):
            cosines = [(a / a.norm()) @ (b / b.norm()) for a, b in zip(p_sample, z_sample)]
            total -= sum(float(c) for c in cosines) / len(cosines)
    total /= len(WIDTHS) * 3
    losses = cosine_losses(projections, targets)
    assert torch.stack(losses).mean().item() == pytest.approx(total, rel=1e-12)


def test_each_encoder_has_one_loss_per_sample():
    projections, targets = pairs()
    losses = cosine_losses(projections, targets)
    assert [loss.shape for loss in losses] == [(3,), (3,)]
    for k in range(2):
        (alone,) = cosine_losses(projections[k : k + 1], targets[k : k + 1])
        assert torch.equal(losses[k], alone)


def test_targets_receive_no_gradient():
    projections, targets = pairs()
    for tensor in (*projections, *targets):
        tensor.requires_grad_()
    sum(loss.sum() for loss in cosine_losses(projections, targets)).backward()
    assert all(z.grad is None for z in targets) and all(p.grad.any() for p in projections)


def test_no_encoder_gives_no_loss():
    assert cosine_losses([], []) == []


@pytest.mark.parametrize("counts", ((1, 2), (2, 1), (0, 1), (2, 0)))
def test_counts_that_differ_are_named(counts):
    projections, targets = pairs()
    with pytest.raises(ValueError) as error:
        cosine_losses(projections[: counts[0]], targets[: counts[1]])
    assert all(str(count) in str(error.value) for count in counts)


def test_shapes_that_differ_are_named():
    projections, targets = pairs()
    with pytest.raises(ValueError) as error:
        cosine_losses(projections, targets[::-1])
    assert "(3, 4, 8)" in str(error.value) and "expected (3, 4, 5)" in str(error.value)
