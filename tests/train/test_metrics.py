"""The accumulator of metrics: means, bins over t, skipped steps, and resuming."""

import json

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from repa_fast.distributed import World
from repa_fast.train.metrics import T_BINS, Accumulator, StepValues

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ALONE = World(0, 1, CPU)
GOOD, BAD = torch.tensor(0.0), torch.tensor(1.0)
NAN = float("nan")


class Run:
    """`size` processes; `add` gives each its share of a step, as train_step does."""

    def __init__(self, size: int = 1) -> None:
        self.processes = processes = [Accumulator(["align/a"], CPU) for _ in range(size)]

        class Lockstep(World):
            """Of one among others whose sums are at hand."""

            def gather(self, tensor: torch.Tensor) -> torch.Tensor:
                return torch.stack([process.sums for process in processes])

            def sum(self, tensor: torch.Tensor) -> torch.Tensor:
                return tensor.copy_(self.gather(tensor).sum(0))

        together = [Lockstep(rank, size, CPU) for rank in range(size)]
        self.worlds = together if size > 1 else [ALONE]

    def add(self, denoise: torch.Tensor, t: torch.Tensor, norm: float = 1.0, bad=GOOD) -> None:
        size = len(self.processes)
        for process, part, times in zip(self.processes, denoise.chunk(size), t.chunk(size)):
            mean = part.mean()
            values = StepValues(2 * mean, mean, -mean[None], part)
            process.add(values, mean * 0 + norm, bad, times)

    def resumed(self, size: int) -> "Run":
        """What `size` processes make of the state, which all of these agree on."""
        state, *others = (p.state(world) for p, world in zip(self.processes, self.worlds))
        assert all(other == state for other in others) and json.loads(json.dumps(state)) == state
        run = Run(size)
        for process, world in zip(run.processes, run.worlds):
            process.load_state(state, world)
        return run

    def read(self) -> dict:
        return self.processes[0].read(self.worlds[0])

    @property
    def bad_runs(self) -> list[int]:
        return [int(process.bad_run) for process in self.processes]


def steps(count: int, batch: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Losses and times of some steps."""
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.rand(2, batch, generator=generator)) for _ in range(count)]


def assert_equal_readings(got: dict, expected: dict) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-6), name


def test_a_reading_holds_the_means_over_steps():
    accumulator = Accumulator(["align/a", "align/b"], CPU)
    assert accumulator.names == ["loss", "denoise", "grad_norm", "align/a", "align/b"]
    for row in torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 5.0, 7.0, 9.0, 11.0]]):
        values = StepValues(row[0], row[1], row[3:], torch.ones(2))
        accumulator.add(values, row[2], GOOD, torch.tensor([0.1, 0.2]))
    reading = accumulator.read(ALONE)
    means = {"loss": 2.0, "denoise": 3.5, "grad_norm": 5.0, "align/a": 6.5, "align/b": 8.0}
    assert {name: reading[name] for name in means} == means
    assert reading["skipped"] == 0


def test_losses_are_binned_by_t():
    run, data = Run(), steps(7, batch=40)
    for denoise, t in data:
        run.add(denoise, t)
    values = np.concatenate([denoise.numpy() for denoise, _ in data]).astype(np.float64)
    times = np.concatenate([t.numpy() for _, t in data])
    totals, edges = np.histogram(times, bins=T_BINS, range=(0, 1), weights=values)
    counts, _ = np.histogram(times, bins=edges)
    assert counts.min() > 0
    assert run.read()["loss_by_t"] == pytest.approx((totals / counts).tolist(), rel=1e-12)
    run.add(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0]))
    assert run.read()["loss_by_t"] == [2.0, *[None] * 8, 3.0], "the ends of t"


def test_skipped_steps_add_nothing_but_their_count():
    with_bad, without = Run(), Run()
    for denoise, t in steps(3):
        without.add(denoise, t)
        with_bad.add(denoise, t)
        with_bad.add(torch.full((12,), NAN), t, norm=float("inf"), bad=BAD)
    got, expected = with_bad.read(), without.read()
    assert got.pop("skipped") == 3 and expected.pop("skipped") == 0
    assert_equal_readings(got, expected)
    with_bad.add(denoise * NAN, t, bad=BAD)
    alone = with_bad.read()
    assert alone["loss"] is None and alone["align/a"] is None and alone["skipped"] == 1


def test_the_bad_run_counts_consecutive_skipped_steps_and_reading_resets_all_but_it():
    run, (first, second), seen = Run(), steps(2), []
    for bad in (GOOD, BAD, BAD, GOOD, BAD, BAD, BAD, GOOD, BAD):
        run.add(*first, bad=bad)
        seen += run.bad_runs
    assert seen == [0, 1, 2, 0, 1, 2, 3, 0, 1]
    run.read()
    empty = run.read()
    assert empty["loss"] is None and empty["loss_by_t"] == [None] * T_BINS
    assert empty["skipped"] == 0 and run.bad_runs == [1]
    run.add(*second)
    assert run.read()["denoise"] == pytest.approx(second[0].mean().item())


@pytest.mark.parametrize("taken", [3, 5])
@pytest.mark.parametrize("before, after", [(1, 1), (2, 2), (2, 1), (1, 2), (4, 2), (2, 3)])
def test_a_resumed_run_reads_what_an_undisturbed_one_reads(before, after, taken):
    """Steps before and after weigh the same; skipped ones are counted once, and still in a row."""
    run, undisturbed, data = Run(before), Run(), steps(5)
    for denoise, t in data[:taken]:
        run.add(denoise, t)
    for _ in range(3):
        run.add(*data[0], bad=BAD)
    run = run.resumed(after)
    assert run.bad_runs == [3] * after
    for denoise, t in data[taken:]:
        run.add(denoise, t)
    for denoise, t in data:
        undisturbed.add(denoise, t)
    assert_equal_readings(run.read(), undisturbed.read() | {"skipped": 3})


class Devices(TorchDispatchMode):
    """Notes every operation on tensors of more than one device."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in (*args, result) if isinstance(t, torch.Tensor)]
        if len({t.device.type for t in tensors}) > 1:
            self.copies.append(str(function))
        return result


def test_adding_a_step_copies_nothing_from_the_host():
    """Such a copy makes the host wait. The device exists in name only: reading it would raise."""
    with FakeTensorMode():
        accumulator = Accumulator(["align/a"], CUDA)
        others, losses, zero = (torch.zeros(s, device=CUDA) for s in (1, 12, ()))
        with Devices() as seen:
            accumulator.add(StepValues(zero, zero, others, losses), zero, zero, losses)
        assert seen.copies == []
        with Devices() as seen:
            others.copy_(torch.ones(1))  # torch 2.11 does the same for others[0] = 1
        assert seen.copies == ["aten.copy_.default"]
