"""Steps of AdamWEMA on a tiny model, whole or sharded by FSDP2."""

import copy

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from repa_fast.distributed import World
from repa_fast.testing import seeded
from repa_fast.train.optim import AdamWEMA, clip_factor
from tests.train.parallel_ranks import whole

DECAYS = (0.9, 0.5)
SKIPPED = 3
MAX_NORM = 5.0


def small_net() -> nn.Module:
    """The last layer has one row, so that a second rank holds empty shards of it."""
    net = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 1))
    net.frozen = nn.Parameter(torch.empty(3, 4), requires_grad=False)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(seeded(tuple(p.shape), seed=i))
    return net


def steps(world: World, ema_warmup: bool = False, count: int = 6) -> dict[str, torch.Tensor]:
    """Whole parameters, moments, averages and norms after `count` steps; one of them is skipped.

    With `ema_warmup` each step has other rates of the averages.
    """
    model = small_net()
    averages = [copy.deepcopy(model).requires_grad_(False) for _ in DECAYS]
    if world.size > 1:
        for module in (model, *averages):
            fully_shard(module[0])
            fully_shard(module)
    optimizer = AdamWEMA(
        model.parameters(), [a.parameters() for a in averages], DECAYS,
        lr=0.05, weight_decay=0.1, implementation="torch",
    )  # fmt: skip
    empty = [p for p in model.parameters() if world.size > 1 and not p.to_local().numel()]
    norms, local = [], 4 // world.size
    for step in range(count):
        optimizer.zero_grad(set_to_none=True)
        x = seeded((4, 4), seed=100 + step, std=3.0)
        model(x[world.rank * local : (world.rank + 1) * local]).square().mean().backward()
        norms.append(optimizer.gradient_norm())
        if ema_warmup:
            optimizer.set_ema_rates([1 / (1 + step), 1 / (2 + step)])
        factor = clip_factor(norms[-1], MAX_NORM)
        optimizer.step(grad_scale=factor, skip=torch.tensor(float(step == SKIPPED)))
    found = {"norms": torch.stack(norms), "empty shards": torch.tensor(float(len(empty)))}
    for name, parameter in model.named_parameters():
        found[name] = whole(parameter)
        for key, value in optimizer.state[parameter].items():
            found[f"{name}.{key}"] = whole(value)
        for number, average in enumerate(averages):
            found[f"{name}.ema {number}"] = whole(average.get_parameter(name))
    return found
