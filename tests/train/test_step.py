"""One training step: micro-batches, torch's own pieces, steps that are skipped, precision."""

import copy
import math

import pytest
import torch
from torch import nn

from repa_fast import encoders
from repa_fast.data.digits import digits_metadata
from repa_fast.diffusion.draws import draw
from repa_fast.diffusion.path import linear
from repa_fast.distributed import World
from repa_fast.train.optim import learning_rate
from repa_fast.train.state import build_state
from repa_fast.train.step import accumulate, draw_local, synthetic_batch, train_step
from tests.refusals import refused
from tests.train.adamw import follow
from tests.train.conftest import assert_same, gradients_of


def parameters(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def gradients(state, batch) -> torch.Tensor:
    state.optimizer.zero_grad()
    values = accumulate(state, batch, draw_local(state))
    assert values.denoise.item() == pytest.approx(values.each.mean().item(), abs=1e-6)
    return torch.cat([gradient.flatten() for gradient in gradients_of(state).values()])


@pytest.mark.parametrize("micro_batch", [1, 5, 6])
def test_micro_batches_equal_the_whole(make_state, micro_batch):
    state = make_state()
    batch, _ = synthetic_batch(state, 12)
    whole = gradients(state, batch)
    state.micro_batch = micro_batch
    parts = gradients(state, batch)
    assert whole.norm() > 1e-3
    assert (parts - whole).norm() <= 1e-5 * whole.norm()


def test_accumulation_multiplies_the_batch_as_upstream(make_state):
    state = make_state(batch_size=6, gradient_accumulation_steps=2)
    assert state.local_batch == 12
    whole = make_state(batch_size=12)
    batch, _ = synthetic_batch(whole, 12)
    state.micro_batch = 6
    assert torch.allclose(gradients(state, batch), gradients(whole, batch), atol=1e-6)


def test_baseline_without_encoder_has_no_projector(make_state):
    state = make_state(enc_type="none")
    assert len(state.model.projectors) == 0
    batch, _ = synthetic_batch(state, 12)
    del batch["image"]
    train_step(state, batch)
    assert state.metrics.read(state.world)["skipped"] == 0


def test_steps_equal_plain_adamw_with_clipping_a_schedule_and_averages(make_state):
    """Whole steps against torch's own pieces, written out; the third has a NaN and is skipped."""
    schedule = {"lr_schedule": "cosine", "warmup_steps": 2, "max_train_steps": 8}
    state = make_state(adam_weight_decay=0.05, ema_decay="0.9,0.5", max_grad_norm=0.1, **schedule)
    model, emas = copy.deepcopy(state.model), [state.ema, *state.more_emas]
    averages = [parameters(ema) for ema in emas]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, foreach=False)
    for step in range(5):
        batch, _ = synthetic_batch(state, 12)
        if step == 2:
            batch["moments"].fill_(math.nan)
        train_step(state, batch)
        rate = learning_rate(state.config, step)
        assert state.optimizer.param_groups[0]["lr"].item() == pytest.approx(rate, rel=1e-6)
        if step == 2:
            continue
        draws = draw(0, step, 12, (3, 16, 16), path=linear, drop_prob=0.1)
        mean, std = batch["moments"].chunk(2, dim=1)
        clean = mean + std * draws.posterior_noise
        t = draws.t.view(-1, 1, 1, 1)
        prediction, (projection,) = model(
            (1 - t) * clean + t * draws.noise, draws.t, batch["label"], draws.drop
        )
        target = state.alignment.encoders["digits-vit"](batch["image"])
        cosine = torch.cosine_similarity(projection, target, dim=-1)
        loss = (prediction - (draws.noise - clean)).square().mean() - 0.5 * cosine.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        follow(averages, (0.9, 0.5), list(model.parameters()))
    for ours, theirs in zip([state.model, *emas], [model.parameters(), *averages], strict=True):
        for mine, expected in zip(ours.parameters(), theirs, strict=True):
            assert torch.allclose(mine, expected, atol=2e-6)
    for ema in emas:
        assert not ema.training and not any(p.requires_grad for p in ema.parameters())


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(make_state, value):
    state = make_state(ema_decay="0.9,0.5,0")

    def everything():
        tensors = [p for m in (state.model, state.ema, *state.more_emas) for p in parameters(m)]
        for moments in copy.deepcopy(state.optimizer.state_dict()["state"]).values():
            tensors += moments.values()
        return tensors

    good, _ = synthetic_batch(state, 12)
    train_step(state, good)
    bad = {**good, "moments": good["moments"].clone()}
    bad["moments"][3, 0, 0, 0] = value
    before = everything()
    state.metrics.read(state.world)
    train_step(state, bad)
    assert_same(everything(), before)
    reading = state.metrics.read(state.world)
    assert reading["skipped"] == 1 and reading["loss"] is None
    assert int(state.metrics.bad_run) == 1 and state.step == 2
    train_step(state, good)
    assert int(state.metrics.bad_run) == 0
    assert not torch.equal(everything()[1], before[1])


def test_fp16_overflow_lowers_the_scale_and_skips(make_state):
    state = make_state(mixed_precision="fp16")
    assert state.scaler.is_enabled()
    batch, _ = synthetic_batch(state, 12)
    before = state.scaler.get_scale()
    state.scaler._lazy_init_scale_growth_tracker(state.world.device)
    state.scaler._scale.fill_(1e30)
    weights = parameters(state.model)
    train_step(state, batch)
    assert_same(parameters(state.model), weights)
    assert state.scaler.get_scale() == pytest.approx(0.5e30)
    state.scaler._scale.fill_(before / 64)
    train_step(state, batch)
    assert not torch.equal(parameters(state.model)[1], weights[1])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_fp32_masters_and_comes_close_to_fp32(make_state, precision):
    readings = {}
    for name in ("no", precision):
        state = make_state(mixed_precision=name)
        batch, _ = synthetic_batch(state, 12)
        batch["moments"].normal_(generator=torch.Generator().manual_seed(0))
        batch["image"].random_(0, 256, generator=torch.Generator().manual_seed(0))
        train_step(state, batch)
        readings[name] = state.metrics.read(state.world)
        assert {p.dtype for p in state.model.state_dict().values()} == {torch.float32}
    assert readings[precision]["denoise"] == pytest.approx(readings["no"]["denoise"], rel=2e-2)


def test_images_per_step_must_divide_among_processes(config):
    five = World(rank=0, size=5, device=torch.device("cpu"))
    refused(
        lambda: build_state(config(), digits_metadata(), five),
        "12 images per step do not divide among 5 processes",
    )


def test_the_linear_layers_of_an_encoder_are_cast_once_and_its_tokens_stay_the_same(make_state):
    state = make_state(mixed_precision="bf16")
    ((name, cast),) = state.alignment.encoders.items()
    whole = encoders.load(name, state.config.resolution, "cpu")
    images, _ = synthetic_batch(state, 4)
    with torch.no_grad(), state.autocast():
        assert torch.equal(cast(images["image"]), whole(images["image"]))
    dtypes = {p.dtype for layer in cast.modules() for p in layer.parameters(recurse=False)}
    assert dtypes == {torch.bfloat16, torch.float32}
    assert all(p.dtype == torch.float32 for p in make_state().alignment.encoders[name].parameters())
