"""The step on a CUDA device; batches are made up, so that no dataset package is needed."""

import dataclasses

import pytest
import torch

from repa_fast.configs import presets
from repa_fast.data.digits import digits_metadata
from repa_fast.distributed import World
from repa_fast.train import graph
from repa_fast.train.graph import FIRST_STEPS, stepper
from repa_fast.train.memory import choose_micro_batch
from repa_fast.train.state import build_state
from repa_fast.train.step import synthetic_batch, train_step, update

pytestmark = pytest.mark.gpu


def cuda_state(**overrides):
    torch.compiler.reset()  # a state compiles up to three variants of one block's code
    config = dataclasses.replace(presets.get("digits"), report_to="none", **overrides)
    world = World(rank=0, size=1, device=torch.device("cuda", 0))
    state = build_state(config, digits_metadata(), world)
    state.micro_batch = choose_micro_batch(state)
    return state


def seeded_batch(state, seed=0):
    batch, _ = synthetic_batch(state, state.local_batch)
    batch["moments"].normal_(generator=torch.Generator("cuda").manual_seed(seed))
    batch["image"].random_(0, 256, generator=torch.Generator("cuda").manual_seed(seed))
    return batch


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": "no"},
        {"mixed_precision": "bf16"},
        {"mixed_precision": "fp16"},
        {"mixed_precision": "bf16", "residual_dtype": "bf16"},
    ],
    ids=["fp32", "bf16", "fp16", "bf16 residual"],
)
def test_step_does_not_synchronise_with_the_host(options, compiled):
    state = cuda_state(compile=compiled, **options)
    batch, _ = synthetic_batch(state, state.local_batch)
    for _ in range(2):  # optimizer state and compiled code are made here
        train_step(state, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(state, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.metrics.read(state.world)["loss"] is not None


@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": "bf16"},
        {"mixed_precision": "bf16", "micro_batch": 16},
        {"mixed_precision": "fp16", "align_decay": "linear", "align_until": 16},
    ],
    ids=["bf16", "micro-batches", "fp16"],
)
def test_a_graph_does_what_its_steps_do(options):
    options = options | {"lr_schedule": "cosine", "max_train_steps": 20}
    results = []
    for graphed in ("off", "on"):
        state = cuda_state(cuda_graph=graphed, **options)
        step = stepper(state)
        for number in range(FIRST_STEPS + 5):
            step(seeded_batch(state, number))
        results.append((state.metrics.read(state.world), list(state.ema.parameters())))
    (plain, averages), (graph, graph_averages) = results
    assert graph["skipped"] == 0 and plain["loss"] is not None
    assert graph["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    for expected, found in zip(averages, graph_averages, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_capture_that_fails_leaves_memory_and_generator_as_they_were(monkeypatch, capsys):
    def waits(*arguments):
        update(*arguments)
        torch.ones((), device="cuda").item()

    monkeypatch.setattr(graph, "update", waits)
    state, reserved = cuda_state(), []
    step = stepper(state)
    for number in range(FIRST_STEPS + 2):
        step(seeded_batch(state, number))
        state.optimizer.zero_grad()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert "operation not permitted" in capsys.readouterr().out
    assert reserved[-1] == reserved[FIRST_STEPS - 1]


def test_bf16_follows_fp32():
    losses = {}
    for precision in ("no", "bf16"):
        state = cuda_state(mixed_precision=precision)
        batch = seeded_batch(state)
        for _ in range(20):
            train_step(state, batch)
        losses[precision] = state.metrics.read(state.world)["denoise"]
    assert losses["no"] is not None
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.02)


def test_micro_batch_is_halved_until_it_fits():
    state = cuda_state(batch_size=4096)
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((2 << 30) / total)
    try:
        chosen = choose_micro_batch(state)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 <= chosen <= 4096
