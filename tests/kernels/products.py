"""The operators of csrc/gelu_mlp in plain torch, for where there is no GPU."""

import math

import torch

from repa_fast.kernels.gelu_mlp import op

ROOT_2_OVER_PI = math.sqrt(2 / math.pi)


def gelu(u):
    """Value and derivative of the tanh form of GELU (arXiv 1606.08415), in the dtype of u."""
    t = torch.tanh(ROOT_2_OVER_PI * (u + 0.044715 * u**3))
    inner = ROOT_2_OVER_PI * (1 + 3 * 0.044715 * u**2)
    return u * (1 + t) / 2, (1 + t) / 2 + u * (1 - t**2) * inner / 2


@torch.autocast("cpu", enabled=False)
def forward_into(x, weight1, bias1, weight2, bias2, pre, hidden, y, workspace):
    exact = x.float() @ weight1.float().t() + bias1.float()
    pre.copy_(exact)
    hidden.copy_(gelu(exact)[0])
    y.copy_(hidden.float() @ weight2.float().t() + bias2.float())
    assert workspace.numel() == 32 * 2**20 and workspace.dtype == torch.uint8


@torch.autocast("cpu", enabled=False)
def backward_into(
    dy, x, pre, hidden, weight1, weight2, dpre, dx, dweight1, dbias1, dweight2, dbias2, workspace
):
    def rows(tensor):
        return tensor.float().reshape(-1, tensor.shape[-1])

    exact = dy.float() @ weight2.float() * gelu(pre.float())[1]
    dpre.copy_(exact)
    dbias1.copy_(rows(exact).sum(0))
    dweight2.copy_(rows(dy).t() @ rows(hidden))
    dbias2.copy_(rows(dy).sum(0))
    dweight1.copy_(rows(dpre).t() @ rows(x))
    dx.copy_(dpre.float() @ weight1.float())
    assert workspace.numel() == 32 * 2**20 and workspace.dtype == torch.uint8


def stand_in(patch, backward=backward_into):
    """Let implementation="cuda" run on the CPU, by the functions above; `patch`: a MonkeyPatch."""
    operators = torch.ops.repa_fast
    patch.setattr(operators, "gelu_mlp_forward_into", forward_into, raising=False)
    patch.setattr(operators, "gelu_mlp_backward_into", backward, raising=False)
    patch.setattr(op, "why_not_cuda", lambda device: "")
