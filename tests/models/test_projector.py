"""Heads of SRA and iREPA: names, initial values, and what they compute."""

import numpy as np
import pytest
import torch
from torch import nn

from repa_fast.models.projector import ConvProjector, Projector, SimpleHead, spatial_normalize
from repa_fast.testing import assert_within_budget, seeded
from tests.refusals import refused


@pytest.mark.parametrize(
    "module, width, weights",
    (
        (Projector(6, 10, 4), 4, {"0": (10, 6), "2": (10, 10), "4": (4, 10)}),
        (SimpleHead(6), 6, {"linear1": (12, 6), "linear2": (6, 12)}),
        (ConvProjector(6, 4, 3), 4, {"projection_layer": (4, 6, 3, 3)}),
    ),
)
def test_parameters_are_the_official_ones_in_whose_dtype_tokens_enter(module, width, weights):
    expected = {f"{name}.weight": shape for name, shape in weights.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in weights.items()}
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == expected
    for dtype in (torch.float32, torch.bfloat16):
        output = module.to(dtype)(torch.zeros(2, 9, 6))
        assert output.shape == (2, 9, width) and output.dtype == dtype


def test_the_head_is_two_products_with_silu_between():
    head = SimpleHead(6).double()
    x = seeded((2, 9, 6), seed=1, dtype=torch.float64)
    w1, b1, w2, b2 = (parameter.detach().numpy() for parameter in head.parameters())
    hidden = x.numpy() @ w1.T + b1
    expected = hidden / (1 + np.exp(-hidden)) @ w2.T + b2
    np.testing.assert_allclose(head(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_the_head_starts_xavier_uniform():
    torch.manual_seed(0)
    head, bound = SimpleHead(128), (6 / (3 * 128)) ** 0.5
    for linear in (head.linear1, head.linear2):
        weight = linear.weight.detach()
        assert not linear.bias.any() and weight.abs().max() <= bound
        # 2^15 uniform numbers; the relative deviation of their variance is sqrt(0.8 / 2^15)
        error = weight.square().mean() / (bound**2 / 3) - 1
        assert abs(error) < 5 * (0.8 / weight.numel()) ** 0.5


def test_the_convolution_starts_as_conv2d_does():
    torch.manual_seed(0)
    found = ConvProjector(16, 32, 4).projection_layer.state_dict()
    torch.manual_seed(0)
    expected = nn.Conv2d(16, 32, 3).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_it_is_a_convolution_of_the_grid():
    projector = ConvProjector(5, 7, 4).double()
    plain = nn.Conv2d(5, 7, 3, padding=1).double()
    plain.load_state_dict(projector.projection_layer.state_dict())
    x = seeded((2, 16, 5), seed=1, dtype=torch.float64)
    image = torch.stack([x[:, 4 * row : 4 * row + 4] for row in range(4)], 1)  # (B, 4, 4, D)
    output = plain(image.movedim(-1, 1))
    expected = torch.stack([output[:, :, n // 4, n % 4] for n in range(16)], 1)
    torch.testing.assert_close(projector(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("token", (0, 5, 7, 15))
def test_a_token_sees_its_neighbours_on_the_grid(token):
    x = seeded((1, 16, 5), seed=1).requires_grad_()
    ConvProjector(5, 7, 4)(x)[0, token].sum().backward()
    seen = {n for n in range(16) if x.grad[0, n].any()}
    row, column = divmod(token, 4)
    near = {n for n in range(16) if abs(n // 4 - row) <= 1 and abs(n % 4 - column) <= 1}
    assert seen == near


@pytest.mark.parametrize("shape", ((2, 15, 5), (2, 16, 6), (16, 5)))
def test_tokens_that_do_not_fill_the_grid_are_named(shape):
    message = refused(lambda: ConvProjector(5, 7, 4)(torch.zeros(shape)))
    assert str(shape) in message and "16, 5)" in message


@pytest.mark.parametrize("gamma", (0.0, 0.6, 1.0))
def test_normalised_targets_are_numpys(gamma):
    z = seeded((3, 16, 5), seed=1, dtype=torch.float64, mean=2.0)
    values = z.numpy()
    expected = (values - gamma * values.mean(1, keepdims=True)) / (
        values.std(1, ddof=1, keepdims=True) + 1e-6
    )
    found = spatial_normalize(z, gamma=gamma)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert torch.equal(spatial_normalize(z), found) == (gamma == 0.6)  # which is the default


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_targets_are_normalised_in_fp32(dtype):
    z = seeded((3, 64, 24), seed=1, dtype=dtype, mean=0.5)
    found = spatial_normalize(z)
    wide = z.float()
    working = (wide - 0.6 * wide.mean(1, keepdim=True)) / (wide.std(1, keepdim=True) + 1e-6)
    assert found.dtype == torch.float32
    assert_within_budget("targets", found, spatial_normalize(z.double()), working)


def test_a_constant_channel_is_finite_and_one_token_is_refused():
    assert spatial_normalize(torch.ones(2, 9, 5)).isfinite().all()
    refused(lambda: spatial_normalize(torch.ones(2, 1, 5)), "1 tokens, expected at least 2")
