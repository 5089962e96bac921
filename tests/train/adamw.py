"""Six small parameters, their gradients, and optimizers over them: ours, and torch's AdamW."""

import torch
from torch import nn

from repa_fast.testing import seeded
from repa_fast.train.optim import AdamWEMA, clip_factor

SHAPES = ((2, 3), (40, 50), (70,), (), (30, 1, 2), (60,))
FROZEN, SOMETIMES = 0, 5
"""Positions in SHAPES: never gets a gradient; gets none in every third step."""
LR = 2.0**-7


def make_parameters(dtype=torch.float32, device="cpu"):
    params = [nn.Parameter(seeded(s, seed=i).to(device, dtype)) for i, s in enumerate(SHAPES)]
    params[FROZEN].requires_grad_(False)
    return params


def give_gradients(params, step):
    """From 0.01 to 10 times the standard normal numbers, so that clipping comes and goes."""
    for i, p in enumerate(params):
        p.grad = None
        if i != FROZEN and not (i == SOMETIMES and step % 3 == 1):
            values = seeded(tuple(p.shape), seed=100 * step + i + 50, std=10.0 ** (step % 4 - 2))
            p.grad = values.to(p.device, p.dtype)


def make_groups(params, grouped=True):
    if not grouped:
        return params
    return [
        {"params": params[:3]},
        {"params": params[3:], "lr": LR / 4, "weight_decay": 0.25, "betas": (0.8, 0.9)},
    ]


def copies(params, dtype=None):
    return [p.detach().clone().to(dtype or p.dtype) for p in params]


def our_adamw(params, decays=(), groups=None, **options):
    averages = [copies(params) for _ in decays]
    options = {"lr": LR, "implementation": "torch"} | options
    return AdamWEMA(groups or params, averages, decays, **options)


def torch_adamw(params, **options):
    return torch.optim.AdamW(params, **{"lr": LR, "weight_decay": 0.1} | options)


def clipped_steps(optimizer, params, count, max_norm=1.0, first=0, skipped=()):
    """Take steps, of which those of the numbers in `skipped` do nothing; return the norms."""
    norms = []
    for step in range(first, first + count):
        give_gradients(params, step)
        norms.append(optimizer.gradient_norm())
        skip = torch.full((), float(step in skipped), device=optimizer.device)
        optimizer.step(grad_scale=clip_factor(norms[-1], max_norm), skip=skip)
    return torch.stack(norms)


def plain(dtype, count, *, grouped, max_norm, decays, weight_decay):
    """torch's pieces, written out: (parameters, averages, norms) after `count` steps."""
    params = make_parameters(dtype)
    averages = [copies(params) for _ in decays]
    groups = make_groups(params, grouped)
    optimizer = torch_adamw(groups, weight_decay=weight_decay, foreach=False)
    norms = []
    for step in range(count):
        give_gradients(params, step)
        norms.append(nn.utils.clip_grad_norm_(params, max_norm))
        optimizer.step()
        follow(averages, decays, params)
    return params, averages, torch.stack(norms)


@torch.no_grad()
def follow(averages, decays, params):
    for average, decay in zip(averages, decays, strict=True):
        for a, p in zip(average, params, strict=True):
            a.mul_(decay).add_(p, alpha=1 - decay)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def everything(params, optimizer):
    """Copies of parameters, averages and state."""
    tensors = [*params, *(t for average in optimizer.averages for t in average)]
    for p in params:
        tensors += optimizer.state[p].values() if p in optimizer.state else []
    return copies(tensors)


def assert_implementations_agree(device, steps):
    """Steps of "cuda" against "torch", some parameters with bf16 copies; the second is skipped."""
    runs = []
    for implementation in ("cuda", "torch"):
        params = make_parameters(device=device)
        kept = {p: p.detach().bfloat16() for p in params[1:4]}
        options = {"weight_decay": 0.1, "implementation": implementation, "leaves": kept}
        ours = our_adamw(params, (0.9, 0.5), **options)
        clipped_steps(ours, params, steps, skipped=(1,))
        runs.append(everything(params, ours))
        assert all(torch.equal(copy, p.bfloat16()) for p, copy in kept.items())
    torchs = 2**-24 * 0.999 / 0.001  # torch takes 1 - beta2 in fp32, of a rounded beta2
    for a, b in zip(*runs, strict=True):
        assert (a - b).norm() <= (torchs + 1e-6) * b.norm()


def as_model(params):
    """A module with the parameters, as torch.distributed.checkpoint wants them."""
    model = nn.Module()
    for i, p in enumerate(params):
        model.register_parameter(f"p{i}", p)
    return model
