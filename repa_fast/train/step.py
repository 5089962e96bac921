"""One training step, from a batch to updated weights, without a host synchronisation."""

import contextlib

import torch
from torch import nn

from repa_fast.data import latents
from repa_fast.data.loader import Batch
from repa_fast.diffusion import sra
from repa_fast.diffusion.draws import Draws, draw
from repa_fast.diffusion.flow import velocity_loss
from repa_fast.train.align import alignment_losses, alignment_weight
from repa_fast.train.optim import clip_factor, learning_rate, record_overflow
from repa_fast.train.state import TrainState


def draw_local(state: TrainState) -> Draws:
    """This process's slice of the draws of the next step, on its device."""
    config = state.config
    draws = draw(
        config.seed,
        state.step,
        config.images_per_step,
        state.metadata.latent_shape,
        path=state.path,
        weighting=config.weighting,
        drop_prob=config.drop_prob,
        device=state.world.device,
    )
    start = state.world.rank * state.local_batch
    return draws.part(start, start + state.local_batch)


def synthetic_batch(state: TrainState, size: int) -> tuple[Batch, Draws]:
    """A batch of `size` random images and its draws, of the run's shapes, on its device."""
    metadata, device = state.metadata, state.world.device
    shape = (size, 3, metadata.resolution, metadata.resolution)
    batch: Batch = {
        "index": torch.arange(size, device=device),
        "moments": torch.randn((size, *metadata.moments_shape), device=device),
        "label": torch.arange(size, device=device) % state.config.num_classes,
        "image": torch.randint(0, 256, shape, dtype=torch.uint8, device=device),
    }
    for column in state.features:
        tokens = torch.randn((size, column.tokens, column.width))
        batch |= {name: torch.from_numpy(a).to(device) for name, a in column.pack(tokens).items()}
    draws = draw(0, 0, size, metadata.latent_shape, path=state.path, device=device)
    return batch, draws


def losses(
    state: TrainState, model: nn.Module, batch: Batch, draws: Draws
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Velocity loss and the losses of what is aligned, (B) each, in fp32."""
    clean = latents.sample(batch["moments"], draws.posterior_noise, state.metadata)
    noisy, velocity = state.path.interpolate(clean, draws.noise, draws.t)
    with state.autocast():
        with torch.no_grad():
            targets = alignment_targets(state, batch, clean, draws) if state.aligns else []
        prediction, projections = model(
            noisy, draws.t, batch["label"], draws.drop, project=bool(targets)
        )
    aligned = alignment_losses(projections, targets, state.config, state.world)
    return velocity_loss(prediction, velocity), aligned


def alignment_targets(
    state: TrainState, batch: Batch, clean: torch.Tensor, draws: Draws
) -> list[torch.Tensor]:
    """What the heads' outputs are aligned with: (B, N, width) of each encoder, or of SRA's teacher.

    The teacher is the average, stopped after its block, at an earlier time, with the same noise and
    the same dropped labels (SRA, arXiv 2505.02831).
    """
    config = state.config
    if config.align == "sra":
        t = sra.teacher_times(draws.t, draws.offset, config.t_max)
        noisy, _ = state.path.interpolate(clean, draws.noise, t)
        return [state.ema.hidden(noisy, t, batch["label"], draws.drop, depth=config.block_out_t)]
    online = [encoder(batch["image"]) for encoder in state.encoders.values()]
    return online + [column.unpack(batch) for column in state.features]


def accumulate(state: TrainState, batch: Batch, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the mean loss over this process's batch, micro-batch by micro-batch.

    Returns:
        values: mean loss, velocity loss, a zero in the place of the norm, alignment losses.
        denoise: (local batch), the velocity losses.
    """
    size = len(draws.t)
    weight = alignment_weight(state.config, state.step)
    starts = range(0, size, state.micro_batch)
    denoise, align = [], []
    for start in starts:
        stop = min(start + state.micro_batch, size)
        micro = {name: tensor[start:stop] for name, tensor in batch.items()}
        last = stop == size
        with contextlib.nullcontext() if last or state.world.size == 1 else state.wrapped.no_sync():
            velocity_part, align_parts = losses(
                state, state.wrapped, micro, draws.part(start, stop)
            )
            loss = velocity_part.sum()
            for part in align_parts:
                loss = loss + weight / len(align_parts) * part.sum()
            state.scaler.scale(loss / size).backward()
        denoise.append(velocity_part.detach())
        align.append(torch.stack([part.detach().sum() for part in align_parts]) if align_parts
                     else velocity_part.new_zeros(len(state.metrics.aligned)))  # fmt: skip
    denoise = torch.cat(denoise)
    align = torch.stack(align).sum(0) / size
    alignment = align.mean() if len(align) else align.new_zeros(())
    loss = denoise.mean() + weight * alignment
    return torch.cat([torch.stack([loss, denoise.mean(), loss.new_zeros(())]), align]), denoise


def train_step(state: TrainState, batch: Batch) -> None:
    """One optimizer step on this process's share of the global batch; counts it in state.step.

    A non-finite loss or gradient on any process makes it a no-op on weights, optimizer and average.
    """
    draws = draw_local(state)
    state.optimizer.zero_grad(set_to_none=True)
    values, denoise = accumulate(state, batch, draws)
    unscale = values.new_ones(())
    if state.scaler.is_enabled():
        unscale = state.scaler._get_scale_async().reciprocal()
    values[2] = norm = state.optimizer.gradient_norm() * unscale
    bad = state.world.max(1 - torch.isfinite(values[0] + norm).float())
    state.optimizer.set_lr(learning_rate(state.config, state.step))
    factor = clip_factor(norm, state.config.max_grad_norm) * unscale
    state.optimizer.step(grad_scale=factor, skip=bad)
    if state.scaler.is_enabled():
        record_overflow(state.scaler, state.optimizer, bad)
        state.scaler.update()
    state.metrics.add(values, bad, denoise, draws.t)
    state.step += 1
