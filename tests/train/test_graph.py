"""The step as a graph, recorded and replayed without a GPU; test_gpu.py has one."""

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock, call

import pytest
import torch

from repa_fast.data.digits import digits_metadata
from repa_fast.distributed import World
from repa_fast.eval.load import load
from repa_fast.objective.base import Alignment
from repa_fast.train import graph
from repa_fast.train.graph import (
    FIRST_STEPS,
    GraphedStep,
    describe,
    stepper,
)
from repa_fast.train.report import read_metrics
from repa_fast.train.state import build_state
from repa_fast.train.step import synthetic_batch, train_step
from tests.refusals import refused
from tests.train.conftest import assert_same, tiny_config

GPU = World(rank=0, size=1, device=torch.device("cuda", 0))
SCHEDULE = {"lr_schedule": "cosine", "max_train_steps": 12, "warmup_steps": 3}
DECAY = {"align_decay": "linear", "align_until": 9}


class Recorder:
    """Records work on a CPU: doing it again stands for a replay, as it reads the same memory."""

    def __init__(self) -> None:
        self.seen = []

    def __call__(self, work, stream=None):
        self.seen.append("recorded")

        def replay():
            with pytest.MonkeyPatch.context() as patch:  # no Python of a step runs in a replay
                patch.setattr(Alignment, "weight", None)
                work()

        return SimpleNamespace(replay=replay, reset=lambda: self.seen.append("freed"))


def batches(state, count):
    for number in range(count):
        torch.manual_seed(number)
        yield synthetic_batch(state, state.local_batch)[0]


@pytest.mark.parametrize(
    "overrides",
    (
        {"objective": "ddpm", "mixed_precision": "fp16"},
        DECAY | {"ema_decay": "0.9,0.5", "ema_warmup": True},
    ),
)
def test_what_is_recorded_does_every_step_again(make_state, overrides):
    record, settled = Recorder(), []
    plain, graphed = (make_state(**SCHEDULE, **overrides) for _ in range(2))
    step = GraphedStep(graphed, lambda: settled.append(graphed.step), record)
    for batch in batches(plain, FIRST_STEPS + 4):
        train_step(plain, batch)
        step(batch)
        batch["moments"].zero_()  # the next batch may lie in the same memory
    assert record.seen == ["recorded"] and settled == [FIRST_STEPS]
    assert plain.step == graphed.step == FIRST_STEPS + 4
    for a, b in zip(*((s.model, s.ema, *s.more_emas) for s in (graphed, plain)), strict=True):
        assert_same(a.state_dict().values(), b.state_dict().values())
    assert plain.metrics.read(plain.world) == graphed.metrics.read(graphed.world)


def test_no_step_replaces_a_tensor_that_a_graph_reads(make_state):
    """A graph has addresses: those of what a step changes stay."""
    state = make_state(**SCHEDULE | DECAY, mixed_precision="fp16", ema_warmup=True)

    def addresses():
        optimizer = state.optimizer
        tensors = [state.head_weight, state.metrics.sums, state.metrics.bad_run]
        tensors += [state.scaler._scale, state.scaler._growth_tracker, *optimizer.ema_rates]
        tensors += [group["lr"] for group in optimizer.param_groups]
        tensors += [tensor for one in optimizer.state.values() for tensor in one.values()]
        return [tensor.data_ptr() for tensor in tensors]

    seen = []
    for batch in batches(state, 2):
        train_step(state, batch)
        seen.append((addresses(), state.head_weight.item()))
    assert seen[0][0] == seen[1][0]
    assert seen[0][1] != seen[1][1]


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
    "flags, found",
    (
        ({}, "off, since of 2 processes no gain was measured yet (--cuda-graph on tries it)"),
        ({"cuda_graph": "on"}, "on (on)"),
        ({"cuda_graph": "on", "parallel": "fsdp"}, "off, since parallel is 'fsdp', expected ddp"),
    ),
)
def test_several_processes_have_a_graph_where_it_is_asked_for(make_state, flags, found):
    state = make_state(**flags)
    state.world = replace(GPU, size=2)
    assert describe(state) == f"cuda_graph: {found}"


def fails(work):
    try:
        raise RuntimeError("operation not permitted\nmore")
    finally:
        raise ValueError("the capture is broken")


def test_a_capture_that_fails_is_one_line_and_the_steps_go_on(make_state, capsys):
    """Also where a backward pass breaks off, with gradients of a part of the weights."""
    plain, graphed = make_state(), make_state()
    plain.micro_batch = graphed.micro_batch = 5

    def breaks_off(work):
        step._batch["label"].zero_()
        with graphed.model.blocks[1].attn.proj.weight.register_hook(fails):
            work()

    step = GraphedStep(graphed, record=breaks_off)
    for batch in batches(plain, FIRST_STEPS + 3):
        train_step(plain, batch)
        step(batch)
    line = "cuda_graph: not captured, RuntimeError: operation not permitted\n"
    assert capsys.readouterr().out == line
    assert_same(graphed.model.parameters(), plain.model.parameters())
    step = GraphedStep(make_state(cuda_graph="on"), record=fails)
    *first, last = batches(plain, FIRST_STEPS + 1)
    for batch in first:
        step(batch)
    with pytest.raises(ValueError, match="broken"):
        step(last)


def one_fails(world, failing):
    """What two processes do where `failing` of them cannot record."""
    state = build_state(tiny_config(cuda_graph="on"), digits_metadata(), world)
    state.micro_batch = state.local_batch
    record = Recorder()

    def breaks_off(work):
        first = state.model.blocks[0].attn.qkv.weight.register_hook(fails)
        try:
            work()
        finally:
            first.remove()

    step = GraphedStep(state, record=breaks_off if world.rank in failing else record)
    for batch in batches(state, FIRST_STEPS + 2):
        step(batch)
    step.close()
    return record.seen, state.step, [p.detach().numpy() for p in state.model.parameters()]


def test_all_processes_replay_or_none_does(ranks):
    both, (first, second) = ranks(one_fails, ()), ranks(one_fails, (1,))
    assert [seen for seen, *_ in both] == [["recorded", "freed"]] * 2
    assert first[0][:2] == ["recorded", "freed"] and second[0] == []
    assert {step for _, step, _ in (*both, first, second)} == {FIRST_STEPS + 2}
    for tensors in zip(*(weights for *_, weights in (*both, first, second)), strict=True):
        assert all((tensor == tensors[0]).all() for tensor in tensors)


def test_when_the_alignment_ends_the_step_is_recorded_anew(train, monkeypatch):
    """With the old graph's memory freed before, and every graph's at the end."""
    record, until = Recorder(), FIRST_STEPS + 2
    options = {"align_until": until, "align_decay": "linear"}
    options |= {"max_train_steps": 2 * until + 1, "checkpointing_steps": until}
    plain = train("plain", **options)
    monkeypatch.setattr(graph, "why_not", lambda *_: "")
    monkeypatch.setattr(graph, "capture", record)
    graphed = train("graphed", **options)
    assert record.seen == ["recorded", "freed"] * 2
    timeless = [
        [{k: v for k, v in line.items() if "second" not in k and "stall" not in k} for line in of]
        for of in (read_metrics(run / "metrics.jsonl") for run in (plain, graphed))
    ]
    assert timeless[0] == timeless[1] and load(plain).digest == load(graphed).digest


def test_warm_up_and_capture_are_on_one_stream(make_state, monkeypatch):
    """Each stream has its own memory. CUDA is simulated here; tests/train/test_gpu.py has it."""
    state, cuda = make_state(), MagicMock()
    state.world = GPU
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(graph, "train_step", lambda state, batch: None)
    step = GraphedStep(state)
    for _ in range(FIRST_STEPS):
        step({})
    assert step._record(lambda: None) is cuda.CUDAGraph.return_value
    cuda.Stream.assert_called_once()
    stream = cuda.Stream.return_value
    assert cuda.stream.call_args_list == [call(stream)] * FIRST_STEPS
    cuda.graph.assert_called_once()
    assert cuda.graph.call_args.kwargs["stream"] is stream
