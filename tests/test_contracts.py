"""What a caller's arguments are checked for, and in which words."""

from functools import partial

import pytest
import torch

from repa_fast import contracts
from tests.refusals import refused

TOKENS, WHOLE = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.int64)
CHECKS = (
    (
        contracts.expect_shape,
        ("adaln", "shift", torch.zeros(2, 4), (2, 4)),
        ("adaln", "shift", torch.zeros(4, 2), [2, 4]),
        r"^adaln: shift has shape \(4, 2\), expected \(2, 4\)$",
    ),
    (
        contracts.expect_floating,
        ("adaln", "x", TOKENS),
        ("adaln", "x", WHOLE),
        r"^adaln: x has dtype torch.int64, expected a floating-point dtype$",
    ),
    (
        contracts.expect_out_dtype,
        ("adaln", torch.bfloat16),
        ("adaln", torch.int8),
        r"^adaln: out_dtype is torch.int8, expected a floating-point dtype$",
    ),
    (
        contracts.expect_tokens,
        ("adaln", "x", TOKENS),
        ("adaln", "x", TOKENS[0]),
        r"^adaln: x has shape \(3, 4\), expected \(B, N, D\)$",
    ),
    (
        contracts.expect_tokens,
        ("adaln", "x", TOKENS),
        ("adaln", "x", WHOLE),
        "x has dtype torch.int64",
    ),
    (
        contracts.expect_choice,
        ("vae", "ema", ("mse", "ema")),
        ("vae", "sd", ("mse", "ema")),
        r"^vae is 'sd', expected one of mse, ema$",
    ),
)


@pytest.mark.parametrize("check, right, wrong, words", CHECKS)
def test_what_fits_passes_and_what_does_not_is_refused(check, right, wrong, words):
    assert check(*right) == ((2, 3, 4) if check is contracts.expect_tokens else None)
    refused(partial(check, *wrong), words)
