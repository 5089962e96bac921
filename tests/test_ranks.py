"""The processes of tests/ranks.py: what comes back from them, and what a failed case leaves."""

import contextlib
import os
import time

import pytest
import torch

from tests.ranks import GRACE, Ranks


def answer(world, word):
    return f"{word} {world.rank} of {world.size}, sum {world.sum(torch.tensor(world.rank))}"


def fail_on_the_second(world):
    if world.rank == 1:
        raise ValueError("a bad case")
    world.barrier()  # where nobody comes


def end_the_second(world):
    if world.rank == 1:
        os._exit(3)


@pytest.mark.usefixtures("heavy", "ranks")
def test_a_failed_case_names_its_process_and_leaves_nothing_to_the_next():
    with contextlib.closing(Ranks()) as ranks:
        expected = ["number 0 of 2, sum 1", "number 1 of 2, sum 1"]
        for case, words in (
            (fail_on_the_second, ["process 1 of 2: Traceback", "a bad case", "process 0 of 2: no"]),
            (end_the_second, ["process 1 of 2: it has ended, with status 3"]),
        ):
            assert ranks(answer, "number") == expected
            processes, began = ranks.groups[2].processes, time.monotonic()
            with pytest.raises(pytest.fail.Exception) as failure:
                ranks(case)
            assert all(word in str(failure.value) for word in words), failure.value
            assert time.monotonic() - began < GRACE + 30
            assert not any(process.is_alive() for process in processes)
        assert ranks(answer, "number") == expected
        processes = ranks.groups[2].processes
    assert not any(process.is_alive() for process in processes)
