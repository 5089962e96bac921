from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from repa_fast.distributed import World
from repa_fast.train import graph
from repa_fast.train.graph import FIRST_STEPS, GraphedStep, stepper
from repa_fast.train.step import synthetic_batch, train_step

SCHEDULE = {"lr_schedule": "cosine", "max_train_steps": 12, "warmup_steps": 3}


def batches(state, count):
    for number in range(count):
        torch.manual_seed(number)
        yield synthetic_batch(state, state.local_batch)[0]


@pytest.mark.parametrize("overrides", ({}, {"ema_decay": "0.9,0.5"}, {"objective": "ddpm"}))
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
    for name in ("model", "ema"):
        expected, found = (getattr(s, name).state_dict() for s in (plain, graphed))
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert plain.metrics.read(plain.world) == graphed.metrics.read(graphed.world)


def test_a_replay_draws_anew(make_state):
    state = make_state()
    seen = []
    step = GraphedStep(state, lambda work: lambda: seen.append(step._inputs[1].t.clone()))
    for batch in batches(state, FIRST_STEPS + 2):
        step(batch)
    assert len(seen) == 2 and not torch.equal(*seen)


def test_it_is_asked_for_by_its_flag(make_state):
    train = stepper(make_state())
    assert train.func is train_step
    with pytest.raises(ValueError, match="cuda_graph is set on cpu, expected cuda"):
        stepper(make_state(cuda_graph=True))


def test_what_a_graph_cannot_do_is_refused(make_state):
    state = make_state()
    state.world = World(rank=0, size=2, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="with 2 processes, expected one"):
        GraphedStep(state, lambda work: work)
    state = make_state()
    state.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="mixed_precision fp16, expected bf16 or no"):
        GraphedStep(state, lambda work: work)
    with pytest.raises(ValueError, match="align_decay 'linear', expected constant"):
        make_state(cuda_graph=True, align_decay="linear", align_until=5)
    with pytest.raises(ValueError, match="cuda_graph is set with encoder_stream"):
        make_state(cuda_graph=True, encoder_stream=True)


def test_a_stream_for_encoders_needs_cuda(make_state):
    with pytest.raises(ValueError, match="encoder_stream is set on cpu, expected cuda"):
        make_state(encoder_stream=True)


def test_warm_up_and_capture_are_on_one_stream(make_state, monkeypatch):
    """Each stream has its own memory. CUDA is made up here; tests/train/test_gpu.py has it."""
    made, used = [], []

    class Stream:
        def __init__(self, device):
            self.device = device
            made.append(self)

        def wait_stream(self, other):
            pass

    default = SimpleNamespace(wait_stream=lambda other: None)
    recording = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: default)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: used.append(stream) or nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: recording)
    monkeypatch.setattr(
        torch.cuda, "graph", lambda _, stream, **rest: used.append(stream) or nullcontext(rest)
    )
    monkeypatch.setattr(graph, "train_step", lambda state, batch: None)
    state = make_state()
    state.world = World(rank=0, size=1, device=torch.device("cuda", 0))
    step = GraphedStep(state)
    for _ in range(FIRST_STEPS):
        step({})
    assert step._record(lambda: None) is recording.replay
    assert len(made) == 1 and used == made * (FIRST_STEPS + 1)
