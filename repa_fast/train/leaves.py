"""Linear layers that compute from bf16 weights, whose fp32 values the optimizer holds.

Such a weight, a leaf, has the gradient that the matmul leaves, in bf16: a step casts neither
weights nor their gradients. Its fp32 value is its master. The optimizer takes the leaf's gradient,
steps the master, and writes the leaf while it holds that. Masters are what a state_dict has, under
the layers' own names, and what EMA and moments are made from. Biases are parameters in fp32, with
bf16 copies that the optimizer writes too. FSDP, which gathers weights in bf16, needs none of this.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from repa_fast.models.sit import SiT


class Linear(torch.autograd.Function):
    """x (..., D) -> (..., O), bf16, by a leaf (O, D) and the bf16 copy of a bias (O).

    The bias receives its gradient in fp32, summed over tokens first and then over images: Inductor
    fuses the first sum into the kernel that computes its terms, where one sum over all rows has to
    read them again with more than 32 images.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, copy: torch.Tensor):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, copy)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, weight = ctx.saved_tensors
        of_weight = gradient.flatten(0, -2).t() @ x.flatten(0, -2)
        of_bias = gradient.sum(-2, dtype=torch.float32).view(-1, len(weight)).sum(0)
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        return of_x, of_weight, of_bias, None


class LeafLinear(nn.Linear):
    """A linear layer in bf16: its parameter `weight` is bf16, its fp32 value `master`.

    A state_dict is loaded into all: master, leaf, bias and the bias's copy. The optimizer and a
    joint matmul have these very tensors: TypeError where others would take their places.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.register_buffer("master", layer.weight.detach(), persistent=False)
        self.weight = nn.Parameter(self.master.bfloat16())
        self.bias = layer.bias
        self.register_buffer("bias_copy", self.bias.detach().bfloat16(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Linear.apply(x.to(self.weight.dtype), self.weight, self.bias, self.bias_copy)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.master if keep_vars else self.master.detach()

    def _load_from_state_dict(self, state: dict, prefix: str, metadata: dict, *rest) -> None:
        if metadata.get("assign_to_params_buffers"):
            raise TypeError(f"{prefix}weight has a bf16 leaf: load_state_dict without assign")
        # reports what does not fit
        super()._load_from_state_dict(state, prefix, metadata, *rest)
        value = state.get(f"{prefix}weight")
        if value is not None and value.shape == self.master.shape:
            self.master.copy_(value.detach())
        self.bias_copy.copy_(self.bias.detach())

    def _apply(self, function: Callable, recurse: bool = True) -> nn.Module:
        if any(function(tensor) is not tensor for tensor in (self.master, self.weight)):
            raise TypeError("a model with bf16 leaves stays where it is, in its dtypes")
        return super()._apply(function, recurse)

    def __getstate__(self) -> dict:
        raise TypeError("a model with bf16 leaves cannot be copied or pickled: use state_dict()")


class JointLinear(torch.autograd.Function):
    """x (B, D) -> (B, L O): L linear layers in one matmul, weights (L O, D) and biases (L O).

    The layers' own weights, then their biases, are arguments for the sake of their gradients.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *parameters):
        ctx.save_for_backward(x, weight)
        ctx.layers = len(parameters) // 2
        return torch.addmm(bias, x, weight.t())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, weight = ctx.saved_tensors
        of_weights = (gradient.t() @ x).chunk(ctx.layers)
        of_biases = gradient.sum(0, dtype=torch.float32).chunk(ctx.layers)
        return gradient @ weight, None, None, *of_weights, *of_biases


def add_leaves(model: SiT, *, joint: bool) -> dict[torch.Tensor, torch.Tensor]:
    """Put a LeafLinear in the place of every linear layer of `model`.

    If `joint`, the adaLN layers of all blocks become one matmul, whose gradients are the last of
    all blocks: where they are summed over processes they would wait for nothing to hide them.
    Returns {master: leaf} and {bias: its copy}, which are as the fp32 values are now; who changes
    those writes them.
    """
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear:
                setattr(parent, name, LeafLinear(layer))
    if joint:
        join_adaln(model)
    leaves = {}
    for layer in model.modules():
        if isinstance(layer, LeafLinear):
            leaves |= {layer.master: layer.weight, layer.bias: layer.bias_copy}
    return leaves


def join_adaln(model: SiT) -> None:
    """Let `model.joint_adaln` compute the adaLN layers of all blocks, LeafLinear, as one matmul.

    Their bf16 weights and biases become parts of one tensor each. From the condition c (B, D) it
    computes (B, 6D) of each block, in bf16.
    """
    layers = [block.adaLN_modulation[1] for block in model.blocks]
    weight = torch.cat([layer.weight.detach() for layer in layers])
    bias = torch.cat([layer.bias_copy for layer in layers])
    for layer, *parts in zip(layers, weight.chunk(len(layers)), bias.chunk(len(layers))):
        layer.weight, layer.bias_copy = nn.Parameter(parts[0]), parts[1]
    parameters = [layer.weight for layer in layers] + [layer.bias for layer in layers]

    def compute(c: torch.Tensor) -> Sequence[torch.Tensor]:
        x = F.silu(c).to(weight.dtype)
        return JointLinear.apply(x, weight, bias, *parameters).chunk(len(layers), dim=1)

    model.joint_adaln = compute
