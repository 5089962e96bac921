"""bf16 copies of the linear layers' weights, written by the optimizer and read by the layers.

Autocast makes such a copy at every forward pass, with 6 bytes of traffic per parameter; the
optimizer can write it while it holds the weight, for 2. Layers with a copy take the place of the
model's, with its parameters: these, their gradients and the state_dict stay the same.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from repa_fast.models.sit import SiT


class ReadCopy(torch.autograd.Function):
    """The copy in place of the weight; the weight receives the gradient."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.float(), None


class CopiedLinear(nn.Linear):
    """A linear layer's parameters, under autocast with `weight_copy` (bf16) for the weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("weight_copy", self.weight.detach().bfloat16(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return F.linear(x, ReadCopy.apply(self.weight, self.weight_copy), self.bias)


def weight_gradient(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Sum over all rows in fp32: gradient (..., O), x (..., D) -> (O, D)."""
    gradient, x = gradient.flatten(0, -2), x.flatten(0, -2)
    if gradient.is_cuda:
        return torch.mm(gradient.t(), x, out_dtype=torch.float32)
    with torch.autocast(x.device.type, enabled=False):  # compiled, backward is traced under it
        return gradient.t().float() @ x.float()


def add_copies(model: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
    """Put a CopiedLinear in the place of every linear layer of `model`; return {weight: copy}.

    Copies are as the weights are now; who changes a weight writes its copy.
    """
    copies = {}
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear:
                copied = CopiedLinear(layer)
                setattr(parent, name, copied)
                copies[copied.weight] = copied.weight_copy
    return copies


class JointLinear(torch.autograd.Function):
    """x (B, D) -> (B, L O): L linear layers (O, D) in one matmul, with their copies (L O, D).

    The layers' own weights, then their biases, are arguments for the sake of their gradients.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, copy: torch.Tensor, *parameters: torch.Tensor):
        ctx.save_for_backward(x, copy)
        ctx.layers = len(parameters) // 2
        bias = torch.cat(parameters[ctx.layers :]).to(copy.dtype)
        return torch.addmm(bias, x, copy.t())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, copy = ctx.saved_tensors
        of_weights = weight_gradient(gradient, x).chunk(ctx.layers)
        of_biases = gradient.sum(0, dtype=torch.float32).chunk(ctx.layers)
        return gradient @ copy, None, *of_weights, *of_biases


def join_adaln(model: SiT, copies: dict[nn.Parameter, torch.Tensor]) -> None:
    """Let `model.joint_adaln` compute the adaLN layers of all blocks as one matmul.

    Their copies become parts of one tensor, in which the optimizer goes on to write them. From the
    condition c (B, D) it computes (B, 6D) of each block, in the dtype of the copies.
    """
    layers = [block.adaLN_modulation[1] for block in model.blocks]
    joint = torch.cat([layer.weight_copy for layer in layers])
    for layer, part in zip(layers, joint.chunk(len(layers))):
        layer.weight_copy = copies[layer.weight] = part
    parameters = [layer.weight for layer in layers] + [layer.bias for layer in layers]

    def compute(c: torch.Tensor) -> Sequence[torch.Tensor]:
        x = F.silu(c).to(joint.dtype)
        return JointLinear.apply(x, joint, *parameters).chunk(len(layers), dim=1)

    model.joint_adaln = compute
