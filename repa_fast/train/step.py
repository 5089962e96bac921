"""One training step, from a batch to updated weights, without a host synchronisation."""

import torch
from torch import nn

from repa_fast.data import latents
from repa_fast.data.loader import Batch
from repa_fast.diffusion import ddpm, sra
from repa_fast.diffusion.draws import Draws, draw
from repa_fast.diffusion.flow import noise_loss, velocity_loss
from repa_fast.train.align import alignment_losses, alignment_weight
from repa_fast.train.optim import clip_factor, learning_rate, record_overflow
from repa_fast.train.parallel import accumulation
from repa_fast.train.state import TrainState


def draw_local(state: TrainState) -> Draws:
    """This process's slice of the draws of the next step, on its device."""
    config = state.config
    draws = draw(
        config.seed,
        state.data_step,
        config.images_per_step,
        state.metadata.latent_shape,
        path=state.path,
        prediction=config.prediction,
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
    draws = draw(
        0,
        0,
        size,
        metadata.latent_shape,
        path=state.path,
        prediction=state.config.prediction,
        device=device,
    )
    return batch, draws


def losses(
    state: TrainState, model: nn.Module, batch: Batch, draws: Draws
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss of denoising and the others of `state.metrics.others`, (B) each, in fp32.

    Without alignment those of what is aligned are missing.
    """
    clean = latents.sample(batch["moments"], draws.posterior_noise, state.metadata)
    t = state.path.model_times(draws.t)
    noisy, velocity = state.path.interpolate(clean, draws.noise, t)
    with state.autocast():
        with torch.no_grad():
            targets = alignment_targets(state, batch, clean, draws) if state.aligns else []
        output, projections = model(noisy, t, batch["label"], draws.drop, project=bool(targets))
    config = state.config
    aligned = alignment_losses(projections, targets, config, state.world)
    if config.objective == "ddpm":
        chain = ddpm.chain(state.world.device)
        found = ddpm.ddpm_losses(chain, output, clean, draws.noise, t)
        return found.simple, [found.variational, *aligned]
    if config.prediction == "v":
        return velocity_loss(output, velocity), aligned
    of_noise = noise_loss(config.prediction, output, draws.noise, t, state.path, config.loss_weight)
    return of_noise, aligned


def alignment_targets(
    state: TrainState, batch: Batch, clean: torch.Tensor, draws: Draws
) -> list[torch.Tensor]:
    """What the heads' outputs are aligned with: (B, N, width) of each encoder, or of SRA's teacher.

    The teacher is the average, stopped after its block, at an earlier time, with the same noise and
    the same dropped labels (SRA, arXiv 2505.02831).
    """
    config = state.config
    if config.align == "sra":
        if config.objective == "flow":
            t = sra.teacher_times(draws.t, draws.offset, config.t_max)
        else:
            t = sra.teacher_steps(state.path.model_times(draws.t), draws.offset, config.t_max)
        noisy, _ = state.path.interpolate(clean, draws.noise, t)
        return [state.ema.hidden(noisy, t, batch["label"], draws.drop, depth=config.block_out_t)]
    online = state.encode(batch["image"]) if state.encoders else []
    return online + [column.unpack(batch) for column in state.features]


def accumulate(state: TrainState, batch: Batch, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the mean loss over this process's batch, micro-batch by micro-batch.

    Returns:
        values: mean loss, loss of denoising, a zero in the place of the norm, the other losses.
        denoise: (local batch), the losses of denoising.
    """
    size = len(draws.t)
    weights = other_weights(state)
    starts = range(0, size, state.micro_batch)
    denoise, others = [], []
    for start in starts:
        stop = min(start + state.micro_batch, size)
        micro = {name: tensor[start:stop] for name, tensor in batch.items()}
        with accumulation(state.wrapped, state.config, last=stop == size):
            denoise_part, parts = losses(state, state.wrapped, micro, draws.part(start, stop))
            loss = denoise_part.sum()
            for weight, part in zip(weights, parts):  # fewer parts once alignment has ended
                loss = loss + weight * part.sum()
            state.scaler.scale(loss / size).backward()
        denoise.append(denoise_part.detach())
        sums = [part.detach().sum() for part in parts]
        sums += [denoise_part.new_zeros(())] * (len(weights) - len(parts))
        others.append(torch.stack(sums) if sums else denoise_part.new_zeros(0))
    denoise = torch.cat(denoise)
    others = torch.stack(others).sum(0) / size
    loss = denoise.mean() + sum(weight * other for weight, other in zip(weights, others))
    return torch.cat([torch.stack([loss, denoise.mean(), loss.new_zeros(())]), others]), denoise


def other_weights(state: TrainState) -> list[float]:
    """Of each of `state.metrics.others` in the total loss."""
    aligned = len(state.aligned)
    weight = alignment_weight(state.config, state.step) / max(aligned, 1)
    return [1.0] * (len(state.metrics.others) - aligned) + [weight] * aligned


def train_step(state: TrainState, batch: Batch) -> None:
    """One optimizer step on this process's share of the global batch; counts it in state.step.

    The batch may lie on the host or on the device. A non-finite loss or gradient on any process
    makes it a no-op on weights, optimizer and average.
    """
    state.optimizer.set_lr(learning_rate(state.config, state.step))
    device = state.world.device
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    update(state, batch, draw_local(state))
    state.step += 1


def update(state: TrainState, batch: Batch, draws: Draws) -> None:
    """The part of a step that is the same for every step: work for the device alone."""
    state.optimizer.zero_grad(set_to_none=True)
    values, denoise = accumulate(state, batch, draws)
    unscale = values.new_ones(())
    if state.scaler.is_enabled():
        unscale = state.scaler._get_scale_async().reciprocal()
    values[2] = norm = state.optimizer.gradient_norm() * unscale
    bad = state.world.max(1 - torch.isfinite(values[0] + norm).float())
    factor = clip_factor(norm, state.config.max_grad_norm) * unscale
    state.optimizer.step(grad_scale=factor, skip=bad)
    if state.scaler.is_enabled():
        record_overflow(state.scaler, state.optimizer, bad)
        state.scaler.update()
    state.metrics.add(values, bad, denoise, draws.t)
