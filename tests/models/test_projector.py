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
    head, x = SimpleHead(6), seeded((2, 9, 6), seed=1)
    plain = nn.Sequential(head.linear1, nn.SiLU(), head.linear2)
    torch.testing.assert_close(head(x), plain(x), rtol=0, atol=0)


def test_the_head_starts_xavier_uniform():
    torch.manual_seed(0)
    head, bound = SimpleHead(128), (6 / (3 * 128)) ** 0.5
    for linear in (head.linear1, head.linear2):
        weight = linear.weight.detach()
        assert not linear.bias.any() and weight.abs().max() <= bound
        # 2^15 uniform numbers; the relative deviation of their variance is sqrt(0.8 / 2^15)
        error = weight.square().mean() / (bound**2 / 3) - 1
        assert abs(error) < 5 * (0.8 / weight.numel()) ** 0.5


def test_the_convolution_is_torchs_on_the_grid_from_the_first():
    torch.manual_seed(0)
    projector = ConvProjector(5, 7, 4).double()
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 7, 3, padding=1).double()
    x = seeded((2, 16, 5), seed=1, dtype=torch.float64)
    output = plain(x.mT.unflatten(2, (4, 4)))  # (B, D, rows, columns)
    expected = torch.stack([output[:, :, n // 4, n % 4] for n in range(16)], 1)
    torch.testing.assert_close(projector(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", ((2, 15, 5), (2, 16, 6), (16, 5)))
def test_tokens_that_do_not_fill_the_grid_are_named(shape):
    message = refused(lambda: ConvProjector(5, 7, 4)(torch.zeros(shape)))
    assert str(shape) in message and "16, 5)" in message


@pytest.mark.parametrize("gamma", (0.0, 0.6, 1.0))
def test_normalised_targets_are_numpys(gamma):
    z = seeded((3, 16, 5), seed=1, dtype=torch.float64, mean=2.0)
    values, found = z.numpy(), spatial_normalize(z, gamma=gamma)
    std = values.std(1, ddof=1, keepdims=True)
    expected = (values - gamma * values.mean(1, keepdims=True)) / (std + 1e-6)
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
