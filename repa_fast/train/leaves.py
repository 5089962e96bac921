"""Linear layers that compute from bf16 weights, whose fp32 values the optimizer holds.

Such a weight, a leaf, has the gradient that the matmul leaves, in bf16: a step casts neither
weights nor their gradients. Its fp32 value is its master. The optimizer takes the leaf's gradient,
steps the master, and writes the leaf while it holds that. Masters are what a state_dict has, under
the layers' own names, and what EMA and moments are made from.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from repa_fast.models.sit import SiT


class LeafLinear(nn.Linear):
    """A linear layer under bf16 autocast: its parameter `weight` is bf16, its fp32 value `master`.

    The bias stays fp32. Both weights receive what a state_dict is loaded with.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.register_buffer("master", layer.weight.detach(), persistent=False)
        self.weight = nn.Parameter(self.master.bfloat16())
        self.bias = layer.bias

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.master if keep_vars else self.master.detach()

    def _load_from_state_dict(self, state: dict, prefix: str, *rest) -> None:
        super()._load_from_state_dict(state, prefix, *rest)  # which reports what does not fit
        value = state.get(f"{prefix}weight")
        if value is not None and value.shape == self.master.shape:
            self.master.copy_(value.detach())


class JointLinear(torch.autograd.Function):
    """x (B, D) -> (B, L O): L linear layers (O, D) in one matmul, with their weights as (L O, D).

    The layers' own weights, then their biases, are arguments for the sake of their gradients.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, joint: torch.Tensor, *parameters: torch.Tensor):
        ctx.save_for_backward(x, joint)
        ctx.layers = len(parameters) // 2
        bias = torch.cat(parameters[ctx.layers :]).to(joint.dtype)
        return torch.addmm(bias, x, joint.t())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, joint = ctx.saved_tensors
        of_weights = (gradient.t() @ x).chunk(ctx.layers)
        of_biases = gradient.sum(0, dtype=torch.float32).chunk(ctx.layers)
        return gradient @ joint, None, *of_weights, *of_biases


def add_leaves(model: SiT) -> dict[torch.Tensor, nn.Parameter]:
    """Put a LeafLinear in the place of every linear layer of `model`; return {master: leaf}.

    The adaLN layers of all blocks become one matmul. Leaves are as the masters are now; who changes
    a master writes its leaf.
    """
    leaves = {}
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear:
                setattr(parent, name, LeafLinear(layer))
    join_adaln(model)
    for layer in model.modules():
        if isinstance(layer, LeafLinear):
            leaves[layer.master] = layer.weight
    return leaves


def join_adaln(model: SiT) -> None:
    """Let `model.joint_adaln` compute the adaLN layers of all blocks, LeafLinear, as one matmul.

    Their weights become parts of one tensor. From the condition c (B, D) it computes (B, 6D) of
    each block, in bf16.
    """
    layers = [block.adaLN_modulation[1] for block in model.blocks]
    joint = torch.cat([layer.weight.detach() for layer in layers])
    for layer, part in zip(layers, joint.chunk(len(layers))):
        layer.weight = nn.Parameter(part)
    parameters = [layer.weight for layer in layers] + [layer.bias for layer in layers]

    def compute(c: torch.Tensor) -> Sequence[torch.Tensor]:
        x = F.silu(c).to(joint.dtype)
        return JointLinear.apply(x, joint, *parameters).chunk(len(layers), dim=1)

    model.joint_adaln = compute
