"""Whether a provider is right; one that is not gets no figure."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.kernels.ops import Problem, Tensors
from benchmarks.kernels.providers import Provider
from repa_fast.kernels.attention import BACKENDS
from repa_fast.kernels.attention.backends import describe
from repa_fast.kernels.attention.selection import survey
from repa_fast.testing import assert_within_budget

SAMPLES = 16  # compared; of fewer, the working dtype's own error of a loss would be luck


def why_wrong(
    problem: Problem, provider: Provider, call: Callable[..., Any], device: torch.device
) -> str | None:
    """Return None if `call` is right at `problem`, else why it is not, in one line.

    It runs on the whole batch; some samples of its results and gradients, the first and the last
    among them, are compared with the formula in fp64 and in the working dtype. Attention's backends
    take the self-test that chooses among them.
    """
    try:
        if problem.case.op == "attention" and provider.name in BACKENDS:
            found = survey([BACKENDS[provider.name]], problem.shape, problem.dtype, device)
            return found[0].left_out or None
        inputs, upstream = problem.make_inputs(0, device), problem.make_upstream(0, device)
        got = evaluate(problem, call, inputs, upstream)
        expected(problem, provider.formula or problem.case.reference, device).compare(got)
    except Exception as error:  # kernels of other packages raise anything
        return describe(error)
    return None


@dataclass(frozen=True)
class Expected:
    """Results and gradients of some samples by a formula, in fp64 and in the working dtype."""

    rows: list[int]
    oracle: Tensors
    working: Tensors

    def compare(self, got: Tensors) -> None:
        """Raise AssertionError where `got`, of the whole batch, is outside its error budget."""
        for name, actual in got.items():
            assert_within_budget(name, actual[self.rows], self.oracle[name], self.working[name])


def expected(problem: Problem, formula: Callable[..., Any], device: torch.device) -> Expected:
    """Evaluate `formula` for some samples of the inputs and upstream gradients of seed 0."""
    last = problem.shape[0] - 1
    rows = sorted({i * last // (SAMPLES - 1) for i in range(SAMPLES)})
    inputs = {name: tensor[rows] for name, tensor in problem.make_inputs(0, device).items()}
    upstream = [tensor[rows] for tensor in problem.make_upstream(0, device)]
    working = evaluate(problem, formula, inputs, upstream)
    exact = {name: _double(tensor) for name, tensor in inputs.items()}
    oracle = evaluate(problem, formula, exact, [_double(tensor) for tensor in upstream])
    return Expected(rows, {name: tensor.double() for name, tensor in oracle.items()}, working)


def evaluate(
    problem: Problem, call: Callable[..., Any], inputs: Tensors, upstream: list[torch.Tensor]
) -> Tensors:
    """Return results by name, and the gradient of each argument that has one as "d" + name."""
    case = problem.case
    leaves = {
        name: tensor.detach().requires_grad_(name in case.gradients)
        for name, tensor in inputs.items()
    }
    with torch.set_grad_enabled(bool(case.gradients)):
        outputs = as_tuple(call(**leaves))
    names = case.outputs(problem.shape, problem.dtype)
    results = {name: output.detach() for name, output in zip(names, outputs)}
    if case.gradients:
        wanted = [leaves[name] for name in case.gradients]
        gradients = torch.autograd.grad(outputs, wanted, upstream)
        results.update(zip((f"d{name}" for name in case.gradients), gradients))
    return results


def as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    """Return the results of an op as a tuple, also a single one."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
