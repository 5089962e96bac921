"""Specification of gelu_mlp in plain torch."""

import torch
import torch.nn.functional as F


def gelu_mlp_reference(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
) -> torch.Tensor:
    """gelu(x weight1^T + bias1) weight2^T + bias2 in the dtype of x, autocast or not.

    x (..., D), weight1 (F, D), bias1 (F), weight2 (D, F), bias2 (D); returns (..., D). GELU is its
    tanh approximation; the parameters are rounded to the dtype of x.
    """
    with torch.autocast(x.device.type, enabled=False):
        hidden = F.gelu(F.linear(x, weight1.to(x.dtype), bias1.to(x.dtype)), approximate="tanh")
        return F.linear(hidden, weight2.to(x.dtype), bias2.to(x.dtype))
