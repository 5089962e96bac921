"""AdamW, gradient clipping and the moving average, without reading anything back to the host."""

import torch
from torch import nn

from repa_fast.configs.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW over all parameters in order, frozen ones included (pos_embed is index 0)."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
        fused=True,
    )


def clip_gradients(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale all gradients to at most `max_norm` in place; returns the global norm, a 0-d tensor.

    Gradients of a non-finite norm are left non-finite: the step is then skipped.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


def step_unless(optimizer: torch.optim.AdamW, bad: torch.Tensor) -> None:
    """One optimizer step, or, where the 0-d float tensor `bad` is 1, nothing at all.

    Fused AdamW takes the flag on the device, as it does from a gradient scaler; its step count
    does not advance either.
    """
    optimizer.grad_scale = None
    optimizer.found_inf = bad
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, bad: torch.Tensor) -> None:
    """ema += (1 - decay) * (model - ema) for every parameter, or nothing where `bad` is 1."""
    averages, parameters = list(ema.parameters()), list(model.parameters())
    weight = (1 - decay) * (1 - bad)
    torch._foreach_lerp_(averages, parameters, [weight] * len(averages))
