"""Every objective on two processes, and compiled: the same losses as one process, eager."""

import functools

import pytest
import torch
from torch._dynamo.utils import counters

pytest.importorskip("lance")
pytest.importorskip("timm")

from repa_fast.distributed import World
from tests.launching import launch
from tests.train import objective_ranks
from tests.train.objective_ranks import OBJECTIVES, STEPS, UNTIL

pytestmark = pytest.mark.usefixtures("torchrun")

WORLD = World(0, 1, torch.device("cpu"))
COMPILED = ("repa",)
"""The others cost time; test_guards.py compiles more of them in less."""


@functools.cache
def alone(name):
    """Metrics of each step and final weights, in this process, eager."""
    return objective_ranks.steps(WORLD, name, OBJECTIVES[name])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Of each of two processes, {objective: (metrics of each step, final weights)}."""
    out = tmp_path_factory.mktemp("ranks") / "found"
    process = launch("tests.train.objective_ranks", 2, OUT=str(out))
    assert process.returncode == 0, process.stderr
    return [torch.load(f"{out}.{rank}") for rank in range(2)]


def assert_close_readings(found, expected, rel):
    """Every loss and norm of every step, and losses by time; no step was skipped."""
    assert len(found) == len(expected) == STEPS
    for mine, theirs in zip(found, expected):
        assert mine["skipped"] == theirs["skipped"] == 0
        assert numbers(mine) == pytest.approx(numbers(theirs), rel=rel, abs=rel)


def numbers(reading):
    """Metrics by name, the losses by time one by one; there is none where no time was drawn."""
    by_time = {f"t{tenth}": loss for tenth, loss in enumerate(reading["loss_by_t"])}
    found = {key: value for key, value in reading.items() if key != "loss_by_t"} | by_time
    return {key: value for key, value in found.items() if value is not None}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_equal_one(ranks, name):
    """With negatives of all processes too, where each one's forward pass is its whole share."""
    expected, _ = alone(name)
    for found in ranks:
        assert_close_readings(found[name][0], expected, 1e-6)
    aligned = [
        reading[key] != 0 for reading in expected for key in reading if key.startswith("align/")
    ]
    if OBJECTIVES[name].get("align_until"):
        assert aligned == [True] * UNTIL + [False] * (STEPS - UNTIL)
    else:
        assert all(aligned) and len(aligned) in (0, STEPS)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_both_processes_end_with_the_same_bits(ranks, name):
    """Weights and averages, which are about those of one process."""
    first, second = (found[name][1] for found in ranks)
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    expected = alone(name)[1]
    assert first.keys() == expected.keys()
    start = objective_ranks.start(WORLD, OBJECTIVES[name])
    for key, value in expected.items():
        moved = (value - start[key]).norm()
        # Where AdamW divides gradients that are all rounding by themselves, single values differ.
        assert (first[key] - value).norm() <= 1e-3 * moved, key


def test_negatives_of_a_process_are_fewer_than_those_of_all(ranks):
    """The same weights and images: a smaller pool of keys has a smaller sum in every loss."""
    whole, parts = alone("nt-xent")[0][0], ranks[0]["nt-xent-batch"][0][0]
    assert parts["denoise"] == pytest.approx(whole["denoise"], rel=1e-6)
    # Half of the keys: about log 2 less.
    assert 0.3 < whole["align/digits-vit"] - parts["align/digits-vit"] < 1


@pytest.mark.parametrize(
    "name",
    [
        name if name in COMPILED else pytest.param(name, marks=pytest.mark.heavy)
        for name in OBJECTIVES
    ],
)
def test_compiled_equals_eager(name):
    torch._dynamo.reset()
    counters.clear()
    found, _ = objective_ranks.steps(WORLD, name, OBJECTIVES[name], compiled=True)
    assert counters["stats"]["unique_graphs"] >= 2
    # Compiled sums have another order: a few hundred roundings of 6e-8 at the most in a row.
    assert_close_readings(found, alone(name)[0], 1e-5)
