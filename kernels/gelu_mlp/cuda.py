"""csrc/gelu_mlp, called through its operators."""

import torch

WORKSPACE_BYTES = 32 * 2**20
"""For products that cuBLASLt splits; what NVIDIA recommends on Hopper."""
ALIGNMENT = 16
"""Bytes; kAlignment in csrc/gelu_mlp/gelu_mlp.cu."""

Tensors = tuple[torch.Tensor, ...]


def gelu_mlp_forward(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
) -> Tensors:
    """The result, GELU's argument and GELU's value: (..., D), (..., F), (..., F), all bf16.

    bf16 tensors on CUDA: x (..., D), weight1 (F, D), bias1 (F), weight2 (D, F), bias2 (D).

    Raises:
        RuntimeError: a tensor of another device, dtype or size, or a product that cuBLASLt refuses.
    """
    x, weight1, bias1, weight2, bias2 = map(_ready, (x, weight1, bias1, weight2, bias2))
    pre, hidden = (x.new_empty((*x.shape[:-1], weight1.shape[0])) for _ in range(2))
    y = torch.empty_like(x)
    torch.ops.repa_fast.gelu_mlp_forward_into(
        x, weight1, bias1, weight2, bias2, pre, hidden, y, _workspace(x)
    )
    return y, pre, hidden


def gelu_mlp_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    pre: torch.Tensor,
    hidden: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    weight_dtype: torch.dtype,
) -> Tensors:
    """Gradients of x, weight1, bias1, weight2 and bias2.

    dy is like x; pre and hidden are what `gelu_mlp_forward` returned. The gradients of x and of
    bias1 are bf16, the other three of `weight_dtype`, which is fp32 or bf16.

    Raises:
        RuntimeError: as `gelu_mlp_forward`.
    """
    dy, x, weight1, weight2 = map(_ready, (dy, x, weight1, weight2))
    dpre, dx = torch.empty_like(pre), torch.empty_like(x)
    dweight1, dweight2 = (w.new_empty(w.shape, dtype=weight_dtype) for w in (weight1, weight2))
    dbias1 = x.new_empty(weight1.shape[0])
    dbias2 = x.new_empty(weight2.shape[0], dtype=weight_dtype)
    torch.ops.repa_fast.gelu_mlp_backward_into(
        dy, x, pre, hidden, weight1, weight2,
        dpre, dx, dweight1, dbias1, dweight2, dbias2, _workspace(x),
    )  # fmt: skip
    return dx, dweight1, dbias1, dweight2, dbias2


def _ready(tensor: torch.Tensor) -> torch.Tensor:
    """As it is, or a copy where it is not contiguous or begins at an odd address."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _workspace(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=like.device)
