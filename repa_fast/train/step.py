"""One training step, from a batch to updated weights, without a host synchronisation."""

import torch
from torch import nn

from repa_fast.data import latents
from repa_fast.data.loader import Batch
from repa_fast.diffusion.draws import Draws, draw
from repa_fast.train.metrics import StepValues
from repa_fast.train.optim import clip_factor, ema_rates, learning_rate
from repa_fast.train.parallel import expect_pass
from repa_fast.train.state import TrainState
from repa_fast.train.torch_private import record_overflow, scale_of


def draw_local(state: TrainState) -> Draws:
    """Draw for the next step; return this process's slice, on its device."""
    config = state.config
    of_config = {"weighting": config.weighting, "drop_prob": config.drop_prob}
    draws = _draw(state, config.seed, state.data_step, config.images_per_step, **of_config)
    start = state.world.rank * state.local_batch
    return draws.part(start, start + state.local_batch)


def _draw(state: TrainState, seed: int, step: int, batch: int, **options) -> Draws:
    return draw(
        seed,
        step,
        batch,
        state.metadata.latent_shape,
        path=state.objective.path,
        prediction=state.config.prediction,
        device=state.world.device,
        **options,
    )


def synthetic_batch(state: TrainState, size: int) -> tuple[Batch, Draws]:
    """Return a batch of `size` random images and its draws, of the run's shapes, on its device."""
    metadata, device = state.metadata, state.world.device
    shape = (size, 3, metadata.resolution, metadata.resolution)
    batch: Batch = {
        "index": torch.arange(size, device=device),
        "moments": torch.randn((size, *metadata.moments_shape), device=device),
        "label": torch.arange(size, device=device) % state.config.num_classes,
        "image": torch.randint(0, 256, shape, dtype=torch.uint8, device=device),
    }
    for column in state.alignment.features:
        tokens = torch.randn((size, column.tokens, column.width))
        batch |= {name: torch.from_numpy(a).to(device) for name, a in column.pack(tokens).items()}
    return batch, _draw(state, 0, 0, size)


def losses(
    state: TrainState, model: nn.Module, batch: Batch, draws: Draws
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Compute the loss of denoising and the others, (B) each, in fp32; of alignment while it is."""
    objective, alignment = state.objective, state.alignment
    clean = latents.sample(batch["moments"], draws.posterior_noise, state.metadata)
    t = objective.path.model_times(draws.t)
    noisy, velocity = objective.path.interpolate(clean, draws.noise, t)
    aligns, targets = state.aligns, []
    with state.autocast():
        if aligns:
            with torch.no_grad():
                targets = alignment.targets(batch, clean, draws, objective, state.ema)
        output, projections = model(noisy, t, batch["label"], draws.drop, project=aligns)
    aligned = alignment.losses(projections, targets, state.world) if aligns else []
    denoise, others = objective.losses(output, clean, draws.noise, velocity, t)
    return denoise, [*others, *aligned]


def accumulate(state: TrainState, batch: Batch, draws: Draws) -> StepValues:
    """Leave gradients of the mean loss over this process's batch, micro-batch by micro-batch."""
    size = len(draws.t)
    images = size * state.gradients.world.size
    weights = other_weights(state)
    each, others = [], []
    for start in range(0, size, state.micro_batch):
        stop = min(start + state.micro_batch, size)
        micro = {name: tensor[start:stop] for name, tensor in batch.items()}
        expect_pass(state.model, state.config, last=stop == size)
        denoise, parts = losses(state, state.model, micro, draws.part(start, stop))
        loss, sums = denoise.sum(), [part.sum() for part in parts]
        for weight, part in zip(weights, sums):  # fewer parts once alignment has ended
            loss = loss + weight * part
        with state.gradients.of_pass(first=start == 0, last=stop == size):
            state.scaler.scale(loss / images).backward()
        each.append(denoise.detach())
        sums += [denoise.new_zeros(())] * (len(weights) - len(sums))
        others.append(torch.stack(sums).detach() if sums else denoise.new_zeros(0))
    each, others = torch.cat(each), torch.stack(others).sum(0) / size
    denoise = each.mean()
    loss = denoise + sum(weight * other for weight, other in zip(weights, others))
    return StepValues(loss, denoise, others, each)


def other_weights(state: TrainState) -> list[float | torch.Tensor]:
    """Return the loss weights of the others: the objective's, then those of alignment (0-d)."""
    return [1.0] * len(state.objective.others) + [state.head_weight] * len(state.alignment.heads)


def train_step(state: TrainState, batch: Batch) -> None:
    """Take one optimizer step on this process's share of the global batch; count it in state.step.

    The batch may lie on the host or on the device. A non-finite loss or gradient on any process
    makes it a no-op on weights, optimizer and EMA.
    """
    set_rates(state)
    device = state.world.device
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    update(state, batch, draw_local(state))
    state.step += 1


def set_rates(state: TrainState) -> None:
    """Set what depends on the step: learning rate, 1 - decay of the EMAs, weight of alignment."""
    state.optimizer.set_lr(learning_rate(state.config, state.step))
    state.optimizer.set_ema_rates(ema_rates(state.config, state.step))
    state.set_head_weight()


def update(state: TrainState, batch: Batch, draws: Draws) -> None:
    """Do what is the same in every step: work for the device alone."""
    state.optimizer.zero_grad(set_to_none=True)
    values = accumulate(state, batch, draws)
    scaled = state.scaler.is_enabled()
    unscale = scale_of(state.scaler).reciprocal() if scaled else values.loss.new_ones(())
    norm = state.optimizer.gradient_norm() * unscale
    bad = state.world.max(1 - torch.isfinite(values.loss + norm).float())
    factor = clip_factor(norm, state.config.max_grad_norm) * unscale
    state.optimizer.step(grad_scale=factor, skip=bad)
    if scaled:
        record_overflow(state.scaler, state.optimizer, bad)
        state.scaler.update()
    state.metrics.add(values, norm, bad, draws.t)
