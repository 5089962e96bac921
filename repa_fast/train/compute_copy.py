"""bf16 copies of the linear layers' weights, written by the optimizer and read by the layers.

Autocast makes such a copy at every forward pass, with 6 bytes of traffic per parameter; the
optimizer can write it while it holds the weight, for 2. Parameters, gradients and state_dict stay
the same.
"""

import torch
import torch.nn.functional as F
from torch import nn


class ReadCopy(torch.autograd.Function):
    """The copy in place of the weight; the weight receives the gradient."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.float(), None


class CopiedLinear(nn.Linear):
    """nn.Linear that computes with `weight_copy` (bf16, not in the state_dict) under autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return F.linear(x, ReadCopy.apply(self.weight, self.weight_copy), self.bias)


def add_copies(model: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
    """Give every linear layer of `model` a copy of its weight; {weight: copy}.

    Copies are as the weights are now; who changes a weight writes its copy.
    """
    copies = {}
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = CopiedLinear
            layer.register_buffer("weight_copy", layer.weight.detach().bfloat16(), persistent=False)
            copies[layer.weight] = layer.weight_copy
    return copies
