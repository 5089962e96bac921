"""Contract of gelu_mlp, its implementations and gradients."""

import functools
import logging

import torch

from repa_fast import dispatch, extension
from repa_fast.contracts import expect_choice, expect_floating, expect_shape
from repa_fast.registration import define, first_derivative_only

from .reference import gelu_mlp_reference

IMPLEMENTATIONS = ("auto", "cuda", "reference")
MULTIPLE = 8
"""Of which D and F are multiples: 16 bytes of bf16, as cuBLASLt's epilogues need them."""

Copies = tuple[torch.Tensor, torch.Tensor]
_log = logging.getLogger(__name__)


def gelu_mlp(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    *,
    copies: Copies | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """gelu(x weight1^T + bias1) weight2^T + bias2, with GELU's tanh form (arXiv 1606.08415).

    Computed in the dtype of x, autocast or not. Each gradient has the dtype of its tensor. By the
    CUDA implementation those of fp32 weights and the one of bias2 beside them are the fp32 sums
    themselves, and that of bias1 is rounded to bf16 first; by the reference all are rounded to the
    dtype of x first.

    Args:
        x: (..., D), floating; bf16 for the CUDA implementation.
        weight1, bias1: (F, D) and (F), floating; fp32 masters as a rule.
        weight2, bias2: (D, F) and (D).
        copies: weight1 and weight2 in the dtype of x, which are computed with in their place; the
            weights receive the gradients. Without them the weights are cast at every call.
        implementation: "auto", "cuda" or "reference"; "auto" takes the reference where it was asked
            for in the process, else CUDA where that can run.

    Returns:
        (..., D) in the dtype of x.

    Raises:
        ValueError: a shape, dtype or device that does not fit, with expected and got; or "cuda"
            where it cannot run, with the reason.
    """
    _check(x, weight1, bias1, weight2, bias2, copies)
    unfit = _why_unfit(x, weight1, weight2, *(copies or ()))
    if _runs_cuda(implementation, x.device.type, unfit):
        return GeluMlp.apply(x, weight1, bias1, weight2, bias2, *(copies or (None, None)))
    if copies is not None:
        weight1, weight2 = InPlaceOf.apply(weight1, copies[0]), InPlaceOf.apply(weight2, copies[1])
    return gelu_mlp_reference(x, weight1, bias1, weight2, bias2)


def _check(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    copies: Copies | None,
) -> None:
    op = "gelu_mlp"
    if x.ndim == 0:
        raise ValueError(f"{op}: x has shape (), expected (..., D)")
    if weight1.ndim != 2:
        raise ValueError(f"{op}: weight1 has shape {tuple(weight1.shape)}, expected (F, D)")
    width, hidden = x.shape[-1], weight1.shape[0]
    shapes = {
        "weight1": (weight1, (hidden, width)),
        "bias1": (bias1, (hidden,)),
        "weight2": (weight2, (width, hidden)),
        "bias2": (bias2, (width,)),
    }
    if copies is not None:
        for number, copy in enumerate(copies, start=1):
            shapes[f"copy of weight{number}"] = (copy, shapes[f"weight{number}"][1])
            if copy.dtype != x.dtype:
                raise ValueError(
                    f"{op}: copy of weight{number} has dtype {copy.dtype}, expected {x.dtype} as x"
                )
    expect_floating(op, "x", x)
    for name, (tensor, shape) in shapes.items():
        expect_shape(op, name, tensor, shape)
        expect_floating(op, name, tensor)
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {x.device} as x")


def _why_unfit(x: torch.Tensor, *weights: torch.Tensor) -> str:
    """What the CUDA implementation does not take of these tensors, "" if it takes them."""
    if x.dtype != torch.bfloat16:
        return f"it does not take {x.dtype}"
    if any(width % MULTIPLE for width in weights[0].shape):
        return f"the widths {tuple(weights[0].shape)} are not multiples of {MULTIPLE}"
    if not all(tensor.is_contiguous() for tensor in (x, *weights)):
        return "a tensor is not contiguous"
    return "" if x.numel() else "x is empty"


@torch.compiler.assume_constant_result
def _runs_cuda(implementation: str, device: str, unfit: str) -> bool:
    expect_choice("gelu_mlp: implementation", implementation, IMPLEMENTATIONS)
    if implementation == "reference":
        return False
    if implementation == "auto" and dispatch.asked() == "reference":
        return False
    reason = why_not_cuda(device) or unfit
    if implementation == "cuda" and reason:
        raise ValueError(f"gelu_mlp: implementation is 'cuda', but {reason}")
    if implementation == "auto":
        _say_once(reason)
    return not reason


def why_not_cuda(device: str) -> str:
    """Why the products of csrc cannot run on this kind of device, "" if they can."""
    if device != "cuda":
        return f"the tensors are on {device}"
    return extension.why_not() or torch.ops.repa_fast.gelu_mlp_why_not()


@functools.cache
def _say_once(reason: str) -> None:
    _log.info("gelu_mlp: %s", f"reference, since {reason}" if reason else "cuBLASLt's epilogues")


class InPlaceOf(torch.autograd.Function):
    """The copy in place of the weight; the weight receives the gradient, in its dtype."""

    @staticmethod
    def forward(ctx, weight, copy):
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to(ctx.dtype), None


class GeluMlp(torch.autograd.Function):
    """gelu_mlp by csrc; weights and biases are arguments for the sake of their gradients.

    The copies are what is computed with, casts of the weights if None.
    """

    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, copy1, copy2):
        copy1 = weight1.to(x.dtype) if copy1 is None else copy1
        copy2 = weight2.to(x.dtype) if copy2 is None else copy2
        y, pre, hidden = gelu_mlp_forward(x, copy1, bias1.to(x.dtype), copy2, bias2.to(x.dtype))
        ctx.save_for_backward(x, pre, hidden, copy1, copy2)
        ctx.dtypes = [tensor.dtype for tensor in (weight1, bias1, weight2, bias2)]
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        low = all(dtype == torch.bfloat16 for dtype in (ctx.dtypes[0], ctx.dtypes[2]))
        weight_dtype = torch.bfloat16 if low else torch.float32
        dx, *gradients = gelu_mlp_backward(dy, *ctx.saved_tensors, weight_dtype)
        gradients = (gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes))
        return dx, *gradients, None, None


def _forward_fake(x, weight1, bias1, weight2, bias2):
    shape = (*x.shape[:-1], weight1.shape[0])
    return x.new_empty(x.shape), x.new_empty(shape), x.new_empty(shape)


def _backward_fake(dy, x, pre, hidden, weight1, weight2, weight_dtype):
    return (
        x.new_empty(x.shape),
        x.new_empty(weight1.shape, dtype=weight_dtype),
        x.new_empty(weight1.shape[:1]),
        x.new_empty(weight2.shape, dtype=weight_dtype),
        x.new_empty(weight2.shape[:1], dtype=weight_dtype),
    )


gelu_mlp_forward = define(
    "gelu_mlp_forward(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2)"
    " -> (Tensor, Tensor, Tensor)",
    __package__,
    "gelu_mlp_forward",
    _forward_fake,
    module="cuda",
)
gelu_mlp_backward = define(
    "gelu_mlp_backward(Tensor dy, Tensor x, Tensor pre, Tensor hidden, Tensor weight1,"
    " Tensor weight2, ScalarType weight_dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    __package__,
    "gelu_mlp_backward",
    _backward_fake,
    module="cuda",
)
