"""Every op by every provider, in pytest-benchmark's tables: `make bench`.

On a GPU at SiT-XL/2's shapes, on a CPU at a small shape. pytest-benchmark's own figures are wall
clock with a synchronisation per call; `extra_info` holds those of benchmarks.harness.timing, which
`python -m benchmarks.kernels.run` writes as rows. A provider that is wrong fails and has no figure.
"""

import pytest
import torch

from benchmarks.harness import timing
from benchmarks.kernels.measure import Bench, prepare
from benchmarks.kernels.ops import CASES, Problem, problems
from benchmarks.kernels.providers import Provider, providers

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
CALLS = {
    f"{problem.name} {name}".replace(" ", "-"): (problem, provider)
    for op in CASES
    for problem in problems(op, DEVICE)
    for name, provider in providers(op).items()
}
COMBINATIONS = [
    pytest.param(problem, provider, mode, id=f"{name}-{mode}")
    for name, (problem, provider) in CALLS.items()
    for mode in problem.case.modes
]


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(DEVICE, timing.QUICK if CUDA else timing.ON_CPU)


@pytest.fixture(scope="module")
def checked(bench):
    """Return (problem, provider) -> its function, or a skip or failure; the last one is kept."""
    latest = {}

    def get(problem: Problem, provider: Provider):
        if reason := provider.why_not(DEVICE.type):
            pytest.skip(reason)
        if (problem.name, provider.name) not in latest:
            latest.clear()
            latest[problem.name, provider.name] = bench.checked(problem, provider)
        call, wrong = latest[problem.name, provider.name]
        if wrong:
            pytest.fail(wrong)
        return call

    return get


@pytest.mark.parametrize("problem, provider, mode", COMBINATIONS)
def bench_op(benchmark, bench, checked, problem, provider, mode):
    call = checked(problem, provider)
    benchmark.group = f"{problem.name} {mode}"
    benchmark.extra_info.update(bench.stamp, provider=provider.name, note=provider.note)
    benchmark.extra_info.update(bench.figures(problem, call, mode))
    variant = prepare(problem, call, mode, 0, DEVICE)

    def synchronised():
        variant()
        timing.synchronise(DEVICE)

    benchmark.pedantic(synchronised, rounds=10, iterations=1, warmup_rounds=1)
