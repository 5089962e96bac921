"""The step on a CUDA device; batches are made up, so that no dataset package is needed."""

import dataclasses

import pytest
import torch

from repa_fast.configs.presets import digits
from repa_fast.data.prepare import digits_metadata
from repa_fast.distributed import World
from repa_fast.train.graph import FIRST_STEPS, stepper
from repa_fast.train.memory import choose_micro_batch
from repa_fast.train.state import build_state
from repa_fast.train.step import synthetic_batch, train_step

pytestmark = pytest.mark.gpu


def cuda_state(**overrides):
    config = dataclasses.replace(digits(), report_to="none", **overrides)
    world = World(rank=0, size=1, device=torch.device("cuda", 0))
    state = build_state(config, digits_metadata(), world)
    state.micro_batch = choose_micro_batch(state)
    return state


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_step_does_not_synchronise_with_the_host(precision, compiled):
    state = cuda_state(mixed_precision=precision, compile=compiled)
    batch, _ = synthetic_batch(state, state.local_batch)
    for _ in range(2):  # optimizer state and compiled code are made here
        train_step(state, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(state, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    reading = state.metrics.read(state.world)
    assert reading["loss"] is not None


@pytest.mark.parametrize("joint", [False, True])
def test_a_graph_does_what_its_steps_do(joint):
    options = {"mixed_precision": "bf16", "compute_copy": "optimizer", "joint_adaln": joint}
    results = []
    for graphed in (False, True):
        state = cuda_state(**options, cuda_graph=graphed, lr_schedule="cosine", max_train_steps=20)
        state.optimizer.write_copies()
        step = stepper(state)
        for number in range(FIRST_STEPS + 5):
            batch, _ = synthetic_batch(state, state.local_batch)
            batch["moments"].normal_(generator=torch.Generator("cuda").manual_seed(number))
            batch["image"].random_(0, 256, generator=torch.Generator("cuda").manual_seed(number))
            step(batch)
        results.append((state.metrics.read(state.world), list(state.ema.parameters())))
    (plain, averages), (graph, graph_averages) = results
    assert graph["skipped"] == 0 and graph["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    for expected, found in zip(averages, graph_averages, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_encoders_beside_the_optimizer_give_the_same_run():
    """Batches come from pinned memory and change, so that a copy too early or late would show."""
    results = []
    for beside in (False, True):
        state = cuda_state(mixed_precision="bf16", encoder_stream=beside)
        generator = torch.Generator().manual_seed(0)
        for _ in range(12):
            batch, _ = synthetic_batch(state, state.local_batch)
            host = {name: tensor.cpu() for name, tensor in batch.items()}
            host["moments"].normal_(generator=generator)
            host["image"].random_(0, 256, generator=generator)
            train_step(state, {name: tensor.pin_memory() for name, tensor in host.items()})
        results.append((state.metrics.read(state.world), list(state.model.parameters())))
    (plain, parameters), (streamed, streamed_parameters) = results
    assert streamed["skipped"] == 0 and streamed["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    for expected, found in zip(parameters, streamed_parameters, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_bf16_follows_fp32():
    losses = {}
    for precision in ("no", "bf16"):
        state = cuda_state(mixed_precision=precision)
        batch, _ = synthetic_batch(state, state.local_batch)
        batch["moments"].normal_(generator=torch.Generator("cuda").manual_seed(0))
        batch["image"].random_(0, 256, generator=torch.Generator("cuda").manual_seed(0))
        for _ in range(20):
            train_step(state, batch)
        losses[precision] = state.metrics.read(state.world)["denoise"]
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.02)


def test_micro_batch_is_halved_until_it_fits():
    state = cuda_state(batch_size=4096)
    torch.cuda.empty_cache()
    _free, total = torch.cuda.mem_get_info()
    needed = 2 << 30
    torch.cuda.set_per_process_memory_fraction(needed / total)
    try:
        chosen = choose_micro_batch(state)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 <= chosen <= 4096
