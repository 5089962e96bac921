"""What a caller's arguments are checked for, and in which words."""

from functools import partial

import pytest
import torch

from repa_fast import contracts
from tests.refusals import refused

TOKENS, WHOLE = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.int64)


def test_what_fits_passes_and_tokens_have_their_shape_returned():
    contracts.expect_shape("adaln", "shift", TOKENS, [2, 3, 4])
    contracts.expect_floating("adaln", "x", TOKENS)
    contracts.expect_out_dtype("adaln", torch.bfloat16)
    contracts.expect_choice("vae", "ema", ("mse", "ema"))
    assert contracts.expect_tokens("adaln", "x", TOKENS) == (2, 3, 4)


@pytest.mark.parametrize(
    "check, arguments, words",
    (
        ("shape", ("x", TOKENS, (2, 4, 3)), r"x has shape \(2, 3, 4\), expected \(2, 4, 3\)"),
        ("floating", ("x", WHOLE), "x has dtype torch.int64, expected a floating-point dtype"),
        ("out_dtype", (torch.int8,), "out_dtype is torch.int8, expected a floating-point dtype"),
        ("tokens", ("x", TOKENS[0]), r"x has shape \(3, 4\), expected \(B, N, D\)"),
        ("tokens", ("x", WHOLE), "x has dtype torch.int64, expected a floating-point dtype"),
    ),
)
def test_what_does_not_fit_is_refused(check, arguments, words):
    call = partial(getattr(contracts, f"expect_{check}"), "adaln", *arguments)
    refused(call, f"^adaln: {words}$")


def test_a_choice_is_refused_with_all_that_there_are():
    call = partial(contracts.expect_choice, "vae", "sd", ("mse", "ema"))
    refused(call, "^vae is 'sd', expected one of mse, ema$")
