"""NT-Xent with the pool of all processes: the batch is shared out among them."""

import torch

from repa_fast.diffusion.alignment import nt_xent
from repa_fast.distributed import World
from repa_fast.testing import seeded

BATCH, TOKENS, WIDTH = 4, 3, 5


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Projections and targets of the global batch."""
    shape = (BATCH, TOKENS, WIDTH)
    return seeded(shape, seed=1, dtype=dtype), seeded(shape, seed=2, dtype=dtype)


def collect(world: World, negatives: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Losses of this process's samples and the gradient of their sum."""
    local = BATCH // world.size
    mine = slice(world.rank * local, (world.rank + 1) * local)
    projection, target = (tensor[mine] for tensor in tensors(dtype))
    projection.requires_grad_()
    losses = nt_xent(projection, target, negatives=negatives, world=world, chunk=2)
    losses.sum().backward()
    return {"losses": losses.detach(), "gradient": projection.grad}
