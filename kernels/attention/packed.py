"""Attention on a packed qkv whose gradient comes packed too, as one operator each way.

Autograd would stack dq, dk and dv, which reads and writes 3 widths of every token. Tensors: qkv and
its gradient (B, N, 3, H, K), out and its gradient (B, N, H, K), the log-sum-exp (B, H, N) in fp32.
"""

import torch
from torch import Tensor

from . import cudnn_graph


def _efficient(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    no_bias_nor_sequences = (None,) * 5
    out, lse, *_ = torch.ops.aten._efficient_attention_forward(
        *(*qkv.unbind(2), *no_bias_nor_sequences, 0.0, 0), compute_log_sumexp=True, scale=scale
    )
    return out, lse


def _efficient_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Tensor:
    length, no_dropout, no_mask = (qkv.shape[1],) * 2, (0.0, lse, lse), (0, False)
    arguments = (dout, *qkv.unbind(2), None, out, None, None, *length, lse, *no_dropout, *no_mask)
    dq, dk, *_ = torch.ops.aten._efficient_attention_backward(
        *arguments, scale=scale, shared_storage_dqdkdv=True
    )
    # dq, dk and dv are views of one (B, N, 3, H, K)
    batch, token, head, column = dq.stride()
    return dq.as_strided(qkv.shape, (batch, token, dk.storage_offset(), head, column))


# (qkv, scale) -> out, lse; (dout, qkv, out, lse, scale) -> dqkv; what the rows of lse are padded to
KERNELS = {
    "efficient": (_efficient, _efficient_backward, 32),
    "cudnn": (cudnn_graph.forward, cudnn_graph.backward, 1),
}


@torch.library.custom_op("repa_fast::attention_packed", mutates_args=())
def _forward(qkv: Tensor, scale: float, kernel: str) -> tuple[Tensor, Tensor]:
    return KERNELS[kernel][0](qkv, scale)


@_forward.register_fake
def _(qkv, scale, kernel):
    batch, tokens, _, heads, head_dim = qkv.shape
    rows = tokens + -tokens % KERNELS[kernel][2]
    lse = qkv.new_empty((batch, heads, rows), dtype=torch.float32)
    return qkv.new_empty((batch, tokens, heads, head_dim)), lse


@torch.library.custom_op("repa_fast::attention_packed_backward", mutates_args=())
def _backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, kernel: str
) -> Tensor:
    return KERNELS[kernel][1](dout.contiguous(), qkv, out, lse, scale)


@_backward.register_fake
def _(dout, qkv, out, lse, scale, kernel):
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output) -> None:
    qkv, ctx.scale, ctx.kernel = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.set_materialize_grads(False)  # that of lse is none


def _differentiate(ctx, dout, _dlse):
    return _backward(dout, *ctx.saved_tensors, ctx.scale, ctx.kernel), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def run(kernel: str, qkv: Tensor, scale: float) -> Tensor:
    """Compute attention of qkv (B, N, 3, H, K) -> (B, N, H, K), both contiguous."""
    return _forward(qkv.contiguous(), scale, kernel)[0]
