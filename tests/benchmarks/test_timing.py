import collections
import contextlib
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness import timing
from benchmarks.harness.timing import Effort

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FAST = Effort(graph_ms=0.2, rounds=5, warmup=1)
brief = partial(Effort, warmup=1, warmup_seconds=0.001)


def test_percentiles_of_known_samples():
    assert timing.percentiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)
    assert timing.percentiles([3.0]) == (3.0, 3.0, 3.0)


def test_figures_are_ordered_and_a_sleep_takes_as_long_as_it_sleeps():
    figure = timing.measure([lambda: time.sleep(0.002)], CPU, FAST)
    assert 2 <= figure.p20 <= figure.p50 <= figure.p80
    assert figure.method == "perf_counter" and figure.rounds == 5
    copy = timing.copy_time(1 << 20, CPU, FAST)
    p20, p50, p80 = timing.host_time(lambda: None, CPU, batches=5, calls=10)
    assert 0 < copy.p20 <= copy.p50 <= copy.p80 and 0 < p20 <= p50 <= p80


def test_variants_take_turns_equally_and_results_live_until_the_others_have_run():
    seen, most = collections.Counter(), []

    class Result:
        alive = 0

        def __init__(self, number):
            seen[number] += 1
            Result.alive += 1
            most.append(Result.alive)

        def __del__(self):
            Result.alive -= 1

    variants = [partial(Result, number) for number in range(3)]
    timing.measure(variants, CPU, FAST)
    assert seen[0] == seen[1] == seen[2] > 1
    timing._run(variants, 9)
    assert max(most) == 4 and Result.alive == 0


class Device:
    """What torch.cuda does for timing, on a clock of its own: each call takes 10 us of it."""

    def __init__(self):
        self.now, self.captures, self.capturing, self.fails = 0.0, [], False, False

    def call(self):
        if self.capturing:
            self.captures[-1] += 1
        else:
            self.now += 0.01

    @contextlib.contextmanager
    def graph(self, graph, stream):
        if self.fails:
            raise RuntimeError("not permitted when stream is capturing\nand more")
        self.captures.append(0)
        graph.number = len(self.captures) - 1
        self.capturing = True
        yield
        self.capturing = False


@pytest.fixture
def device(monkeypatch):
    """torch.cuda with stand-ins, so that the path of a GPU runs without one."""
    fake = Device()

    class Graph:
        def replay(self):
            fake.now += 0.01 * fake.captures[self.number]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = fake.now

        def elapsed_time(self, end):
            return end.at - self.at

    cuda = {
        "CUDAGraph": Graph,
        "Event": Event,
        "graph": fake.graph,
        "current_stream": lambda device=None: None,
        "synchronize": lambda device=None: None,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=60 * 2**20),
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return fake


def test_a_graph_holds_whole_turns_and_enough_work_and_a_long_call_once(device):
    figure = timing.measure([device.call] * 7, CUDA, brief(2.0, 4))
    assert figure.method == "cuda graph"
    assert figure.calls == device.captures[-1] == 203  # 29 turns of 7, the first with 2 ms
    assert figure.p50 == pytest.approx(0.01)
    device.captures.clear()
    figure = timing.measure([device.call], CUDA, brief(0.005, 3))
    assert device.captures == [1] and figure.calls == 1


def test_events_where_no_graph_can_be_captured_and_the_reason(device):
    device.fails = True
    figure = timing.measure([device.call] * 2, CUDA, brief(0.995, 3))
    assert figure.method == "events (RuntimeError: not permitted when stream is capturing)"
    assert figure.p50 == pytest.approx(0.01) and figure.calls == 100


def test_inputs_are_three_times_the_cache(device):
    sizes = ((60 * 2**20, CUDA), (200 * 2**20, CUDA), (10**12, CPU))
    assert [timing.sets_needed(*size) for size in sizes] == [3, 1, 1]
