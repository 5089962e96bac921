"""The step as a graph, recorded and replayed without a GPU; test_gpu.py has one."""

from dataclasses import replace
from unittest.mock import MagicMock, call

import pytest
import torch

from repa_fast.distributed import World
from repa_fast.train import graph
from repa_fast.train.graph import FIRST_STEPS, GraphedStep, describe, stepper
from repa_fast.train.step import synthetic_batch, train_step
from tests.refusals import refused
from tests.train.conftest import assert_same

GPU = World(rank=0, size=1, device=torch.device("cuda", 0))
SCHEDULE = {"lr_schedule": "cosine", "max_train_steps": 12, "warmup_steps": 3}


def batches(state, count):
    for number in range(count):
        torch.manual_seed(number)
        yield synthetic_batch(state, state.local_batch)[0]


@pytest.mark.parametrize(
    "overrides", ({}, {"ema_decay": "0.9,0.5", "ema_warmup": True}, {"objective": "ddpm"})
)
def test_what_is_recorded_does_every_step_again(make_state, overrides):
    """Doing the recorded work again stands for a replay: it reads the same memory."""
    recorded = []

    def record(work):
        recorded.append(work)
        return work

    plain, graphed = (make_state(**SCHEDULE, **overrides) for _ in range(2))
    step = GraphedStep(graphed, record)
    for batch in batches(plain, FIRST_STEPS + 4):
        train_step(plain, batch)
        step(batch)
        batch["moments"].zero_()  # the next batch may lie in the same memory
    assert len(recorded) == 1
    assert plain.step == graphed.step == FIRST_STEPS + 4
    for a, b in zip(*((s.model, s.ema, *s.more_emas) for s in (graphed, plain)), strict=True):
        assert_same(a.state_dict().values(), b.state_dict().values())
    assert plain.metrics.read(plain.world) == graphed.metrics.read(graphed.world)


def test_it_is_asked_for_by_its_flag(make_state):
    state = make_state()
    assert stepper(state).func is train_step
    assert describe(state) == "cuda_graph: off, since the device is cpu, expected cuda"
    refused(
        lambda: stepper(make_state(cuda_graph="on")),
        "cuda_graph is on, but the device is cpu, expected cuda",
    )
    state.world = GPU
    assert describe(state) == "cuda_graph: on (auto)"
    state = make_state(cuda_graph="off")
    assert stepper(state).func is train_step and describe(state) == "cuda_graph: off, asked for"


@pytest.mark.parametrize(
    "size, flags, reason",
    (
        (2, {}, "there are 2 processes, expected one"),
        (1, {"mixed_precision": "fp16"}, "mixed_precision is fp16, expected bf16 or no"),
        (1, {"align_decay": "linear", "align_until": 5}, "align_decay is 'linear'"),
    ),
)
def test_what_a_graph_cannot_do_is_known(make_state, size, flags, reason):
    state = make_state(**flags)
    state.world = replace(GPU, size=size)
    assert reason in describe(state)


def test_a_capture_that_fails_is_one_line_and_the_steps_go_on(make_state, capsys):
    def fails(work):
        raise RuntimeError("operation not permitted\nmore")

    plain, graphed = make_state(), make_state()
    step = GraphedStep(graphed, fails)
    for batch in batches(plain, FIRST_STEPS + 3):
        train_step(plain, batch)
        step(batch)
    line = "cuda_graph: not captured, RuntimeError: operation not permitted\n"
    assert capsys.readouterr().out == line
    assert_same(graphed.model.parameters(), plain.model.parameters())
    step = GraphedStep(make_state(cuda_graph="on"), fails)
    *first, last = batches(plain, FIRST_STEPS + 1)
    for batch in first:
        step(batch)
    with pytest.raises(RuntimeError, match="not permitted"):
        step(last)


def test_warm_up_and_capture_are_on_one_stream(make_state, monkeypatch):
    """Each stream has its own memory. CUDA is made up here; tests/train/test_gpu.py has it."""
    state, cuda = make_state(), MagicMock()
    state.world = GPU
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(graph, "train_step", lambda state, batch: None)
    step = GraphedStep(state)
    for _ in range(FIRST_STEPS):
        step({})
    assert step._record(lambda: None) is cuda.CUDAGraph.return_value.replay
    cuda.Stream.assert_called_once()
    stream = cuda.Stream.return_value
    assert cuda.stream.call_args_list == [call(stream)] * FIRST_STEPS
    cuda.graph.assert_called_once()
    assert cuda.graph.call_args.kwargs["stream"] is stream
