"""Figures of a provider at a problem: time, bandwidth, memory, host time; a row of JSON each."""

import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.harness import timing
from benchmarks.harness.environment import stamp
from benchmarks.harness.timing import Effort, Timing
from benchmarks.kernels import gate
from benchmarks.kernels.ops import Problem, problems, short, tiny
from benchmarks.kernels.providers import Provider
from repa_fast.kernels.attention.backends import describe

Row = dict[str, Any]
LOST = ("CUDA error", "AcceleratorError", "illegal memory access", "unspecified launch failure")


class Bench:
    """Measures on one device, with one effort; the copy of a number of bytes is timed once."""

    def __init__(self, device: torch.device, effort: Effort):
        self.device, self.effort = device, effort
        self.stamp = stamp()
        self._verdicts: dict[tuple[str, str], str | None] = {}
        self.copy = functools.cache(lambda n: timing.copy_time(n, device, effort))

    def rows(self, problem: Problem, provider: Provider, modes: tuple[str, ...]) -> Iterator[Row]:
        """Return a row per mode, or one with the reason if the provider is absent or wrong."""
        head = self._head(problem, provider)
        call, refused = self._accepted(problem, provider)
        if refused:
            yield {**head, "mode": "all", **refused}
            return
        for mode in modes:
            try:
                figures = self.figures(problem, call, mode)
            except Exception as error:  # kernels of other packages raise anything
                figures = {"status": "failed", "message": describe(error)}
            yield {**head, "mode": mode, **figures}
            self.tidy()

    def overhead(self, op: str, provider: Provider, first: Problem | None = None) -> Row:
        """Measure the host time of a forward and, if there is one, a backward at a tiny shape.

        The provider has to be right at `first`, or else at the op's first problem.
        """
        problem = tiny(op)
        row = {**self._head(problem, provider), "mode": "overhead"}
        _, refused = self._accepted(first or problems(op, self.device)[0], provider, known=True)
        if refused:
            return {**row, **refused}
        try:
            call = provider.build(problem.case)
            mode = "both" if problem.case.gradients else "forward"
            variant = prepare(problem, call, mode, 0, self.device)
            batches = (
                {"batches": 20, "calls": 50}
                if self.device.type == "cuda"
                else {"batches": 5, "calls": 10}
            )
            figures = timing.host_time(variant, self.device, **batches)
        except Exception as error:
            return {**row, "status": "failed", "message": describe(error)}
        names = ("host_us_p20", "host_us_p50", "host_us_p80")
        return {**row, "status": "ok", "call": mode, **dict(zip(names, figures))}

    def _accepted(
        self, problem: Problem, provider: Provider, known: bool = False
    ) -> tuple[Callable[..., Any] | None, Row]:
        """Return the provider's function, and what a row says if it is absent or wrong.

        If an earlier verdict at this problem is `known`, it counts, and there is no function.
        """
        if reason := provider.why_not(self.device.type):
            return None, {"status": "unavailable", "message": reason}
        if known and (problem.name, provider.name) in self._verdicts:
            call, wrong = None, self._verdicts[problem.name, provider.name]
        else:
            call, wrong = self.checked(problem, provider)
        return call, {"status": "failed", "message": wrong} if wrong else {}

    def checked(
        self, problem: Problem, provider: Provider
    ) -> tuple[Callable[..., Any] | None, str | None]:
        """Return the provider's function, and why it is wrong at this problem, or None."""
        try:
            call = provider.build(problem.case)
            wrong = gate.why_wrong(problem, provider, call, self.device)
            reason = f"gate: {wrong}" if wrong else None
        except Exception as error:
            call, reason = None, describe(error)
        self._verdicts[problem.name, provider.name] = reason
        self.tidy()
        return call, reason

    def figures(self, problem: Problem, call: Callable[..., Any], mode: str) -> Row:
        """Return the time and what follows from it."""
        time, peak = self.time(problem, call, mode)
        nbytes, flops = problem.necessary_bytes(mode), problem.flops(mode)
        copy = self.copy(nbytes)
        row = {"status": "ok", **time.figures, "calls": time.calls, "rounds": time.rounds}
        row |= {"sets": timing.sets_needed(nbytes, self.device), "bytes": nbytes}
        row |= {"gb_per_s": nbytes / time.p50 / 1e6, "copy_gb_per_s": nbytes / copy.p50 / 1e6}
        row |= {"copy_ms_p50": copy.p50, "copy_method": copy.method}
        row |= {"share_of_copy": copy.p50 / time.p50, "peak_bytes": peak}
        return row | {"tflop_per_s": flops / time.p50 / 1e9 if flops else None}

    def time(
        self, problem: Problem, call: Callable[..., Any], mode: str
    ) -> tuple[Timing, int | None]:
        """Return the time, and bytes at the peak of one call above its inputs.

        A backward pass that cannot be captured alone is the difference of both passes and the
        forward one, if these can be; its method says so.
        """
        try:
            time, peak = self._time(problem, call, mode)
            reason = time.method
        except Exception as error:
            if mode != "backward" or any(word in str(error) for word in LOST):
                raise
            time, peak, reason = None, None, describe(error)
        if mode != "backward" or (time and not time.method.startswith("events")):
            return time, peak
        both, forward = (self._time(problem, call, part)[0] for part in ("both", "forward"))
        if time and (both.method.startswith("events") or forward.method.startswith("events")):
            return time, peak
        p50 = both.p50 - forward.p50
        if p50 <= 0:
            raise RuntimeError(f"both passes take {both.p50} ms, the forward one {forward.p50} ms")
        half = (both.p80 - both.p20 + forward.p80 - forward.p20) / 2
        method = f"both - forward, {both.method} ({reason})"
        return Timing(p50 - half, p50, p50 + half, both.calls, both.rounds, method), peak

    def tidy(self) -> None:
        """Give back the memory of the last figure."""
        gc.collect()
        torch.cuda.empty_cache()  # nothing on a CPU

    def _time(
        self, problem: Problem, call: Callable[..., Any], mode: str
    ) -> tuple[Timing, int | None]:
        count = timing.sets_needed(problem.necessary_bytes(mode), self.device)
        with timing.own_stream(self.device):
            variants = [prepare(problem, call, mode, i, self.device) for i in range(count)]
            time = timing.measure(variants, self.device, self.effort)
            return time, timing.peak_memory(variants[0], self.device)

    def _head(self, problem: Problem, provider: Provider) -> Row:
        row = {"op": problem.case.op, "provider": provider.name, "note": provider.note}
        shape = {"shape": list(problem.shape), "dtype": short(problem.dtype)}
        return {**row, **shape, **self.stamp}


def prepare(
    problem: Problem, call: Callable[..., Any], mode: str, seed: int, device: torch.device
) -> Callable[[], Any]:
    """Return one call of `mode` on inputs of `seed`, which it holds.

    forward: without gradients. backward: of a graph that is kept, so that it can run again. both:
    one after the other, with a new graph each time. The call returns what it computed.
    """
    inputs, upstream = problem.make_inputs(seed, device), problem.make_upstream(seed, device)
    if mode == "forward":
        return torch.no_grad()(lambda: call(**inputs))
    leaves = {
        name: tensor.requires_grad_(name in problem.case.gradients)
        for name, tensor in inputs.items()
    }
    wanted = [leaves[name] for name in problem.case.gradients]

    def both() -> Any:
        outputs = gate.as_tuple(call(**leaves))
        gradients = torch.autograd.grad(outputs, wanted, upstream)
        return [output.detach() for output in outputs], gradients

    if mode == "both":
        return both
    outputs = gate.as_tuple(call(**leaves))
    return lambda: torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)
