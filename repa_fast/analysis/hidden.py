"""What a frozen SiT makes of noisy images, averaged over patches.

As in REPA's analysis (arXiv 2410.06940, appendix C): the model gets the null label, since a class
label would be found again in its hidden states, and the projectors take no part.

Shapes: B batch, N rows, L blocks, D width, C latent channels.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import NamedTuple

import torch

from repa_fast import ops
from repa_fast.data import latents
from repa_fast.data.dataset import Metadata
from repa_fast.data.loader import Batch
from repa_fast.diffusion.draws import stream
from repa_fast.diffusion.path import Path, linear
from repa_fast.models.sit import SiT


class Features(NamedTuple):
    """Features of N images, on the CPU: hidden states, fp32 (times, L, N, D), label, int64 (N),
    and mean patch tokens, fp32 (N, width), by encoder."""

    hidden: torch.Tensor
    label: torch.Tensor
    tokens: Mapping[str, torch.Tensor] = MappingProxyType({})


@torch.no_grad()
def hidden_states(
    model: SiT,
    clean: torch.Tensor,
    noise: torch.Tensor,
    t: float,
    *,
    path: Path = linear,
    average: bool = True,
) -> torch.Tensor:
    """Return the mean over patches of the hidden state after every block, for the null label.

    A block hands its MLP branch on as pending; its hidden state is the one with the branch added.

    Args:
        model: on the device of the latents; computes in the precision of the caller's autocast.
        clean, noise: (B, C, h, w), latents as the model was trained on, and standard normal.
        t: time in [0, 1], the same for all; 0 is data, 1 is noise.
        average: over patches; otherwise every patch's state.

    Returns:
        (L, B, D), or (L, B, patches, D), fp32 (fp64 from an fp64 model); entry d - 1 is block d.

    Raises:
        ValueError: t outside [0, 1], or latents of another shape.
    """
    if not 0 <= t <= 1:
        raise ValueError(f"t is {t}, expected a time in [0, 1]")
    times = path.model_times(torch.full((len(clean),), t, dtype=clean.dtype, device=clean.device))
    null = torch.full((len(clean),), model.num_classes, device=clean.device)
    noisy, _ = path.interpolate(clean, noise, times)
    states: list[torch.Tensor] = []

    def resolve(_block: torch.nn.Module, _inputs: tuple, pending: tuple) -> None:
        state = ops.gate_residual(*pending)
        states.append(state.mean(1) if average else state)

    with ExitStack() as hooks:
        for block in model.blocks:
            hooks.enter_context(block.register_forward_hook(resolve))
        model(noisy, times, null, project=False)
    return torch.stack(states)


@torch.no_grad()
def collect(
    model: SiT,
    batches: Iterable[Batch],
    times: Sequence[float],
    *,
    count: int,
    metadata: Metadata,
    path: Path = linear,
    seed: int = 0,
    blocks: Sequence[int] = (),
) -> Features:
    """Collect hidden states of `count` images at each of the times, in the order of the batches.

    The posterior sample and the noise of an image are functions of (seed, its index), the same at
    every time and in every batch.

    Args:
        batches: with index, moments and label; moved to the model's device.
        blocks: which to keep, counted from 1; all L if empty.

    Raises:
        ValueError: another number of rows than `count`, a block that is not there, a time outside
            [0, 1], or hidden states that are not finite in fp32.
    """
    blocks = blocks or range(1, len(model.blocks) + 1)
    for block in blocks:
        if not 1 <= block <= len(model.blocks):
            raise ValueError(f"block is {block}, expected 1..{len(model.blocks)}")
    device, width = model.pos_embed.device, model.pos_embed.shape[-1]
    hidden = torch.empty(len(times), len(blocks), count, width)
    label = torch.empty(count, dtype=torch.int64)
    start = 0
    for batch in batches:
        stop = start + len(batch["index"])
        if stop > count:
            raise ValueError(f"the batches have {stop} rows or more, expected {count}")
        draws = sample_noise(seed, batch["index"], metadata.latent_shape).to(device)
        clean = latents.sample(batch["moments"].to(device), draws[:, 0], metadata)
        for of_time, t in zip(hidden[:, :, start:stop], times, strict=True):
            states = hidden_states(model, clean, draws[:, 1], t, path=path)
            of_time.copy_(states[[block - 1 for block in blocks]])
            if not of_time.isfinite().all():
                raise ValueError(
                    f"hidden states at t = {t} are not finite in {hidden.dtype}, rows {start} to "
                    f"{stop - 1}; expected finite ones"
                )
        label[start:stop] = batch["label"]
        start = stop
    if start != count:
        raise ValueError(f"the batches have {start} rows, expected {count}")
    return Features(hidden, label)


def sample_noise(seed: int, index: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Draw (B, 2, C, h, w) fp32 on the CPU: posterior noise and noise of images `index` (B).

    Each image's is a function of (seed, its index); three keys keep it apart from training's draws.
    """
    streams = (stream(seed, number, 0, 0) for number in index.tolist())
    return torch.stack([torch.randn((2, *shape), generator=one) for one in streams])
