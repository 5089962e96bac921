"""The training step as one CUDA graph: one launch instead of two thousand."""

import math
from collections.abc import Callable
from functools import partial
from traceback import format_exception_only

import torch

from repa_fast.configs.config import TrainConfig
from repa_fast.data.loader import Batch
from repa_fast.diffusion.draws import Draws
from repa_fast.distributed import World
from repa_fast.train.state import TrainState
from repa_fast.train.step import draw_local, set_rates, train_step, update
from repa_fast.train.torch_private import drop_capture

FIRST_STEPS = 3
"""Steps before the capture: they compile, choose algorithms, make the optimizer's state, and with
several processes form the buckets of gradients and open NCCL's communicator."""

Work = Callable[[], None]


class GraphedStep:
    """Takes the place of `train_step`, with the same results.

    Batch and draws are copied to where the graph reads them; what changes from step to step by
    itself lies on the device (`set_rates`). All else is recorded once, so that nothing may change
    between steps but the values of tensors.
    A capture that fails is one line, and steps are taken without it, on all processes: NCCL wants
    a collective replayed by all or by none. RuntimeError where one process was asked for a graph.

    Args:
        state: of a run that `why_not` has nothing against.
        settle: waits for what may wait for the device meanwhile, on all processes alike.
        record: takes what to do, and returns what does it again (`replay`), on the memory it was
            recorded with, and lets go of that (`reset`); by default a CUDA graph.
    """

    def __init__(
        self,
        state: TrainState,
        settle: Work = lambda: None,
        record: Callable[[Work], torch.cuda.CUDAGraph] | None = None,
    ) -> None:
        self._state, self._settle = state, settle
        on_cuda = state.world.device.type == "cuda"
        self._stream = torch.cuda.Stream(state.world.device) if on_cuda else None
        self._record = record or partial(capture, stream=self._stream)
        self._left: float = FIRST_STEPS  # to take without a graph
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch) -> None:
        """Take one optimizer step; count it in state.step."""
        state = self._state
        if not self._left and self._graph is None:
            self._capture(batch)
        if self._left:
            self._left -= 1
            on_stream(self._stream, lambda: train_step(state, batch))
            return
        set_rates(state)
        draws = draw_local(state)
        for name, tensor in self._batch.items():
            tensor.copy_(batch[name], non_blocking=True)
        torch._foreach_copy_(list(self._draws), list(draws))
        self._graph.replay()
        state.step += 1

    def close(self) -> None:
        """Free the graph and its memory; NCCL's communicators wait for that when they end."""
        if self._graph is not None:
            self._graph.reset()

    def _capture(self, batch: Batch) -> None:
        """Record the step, or take every step as the first ones."""
        state, failure = self._state, ""
        self._batch = {n: t.to(state.world.device, copy=True) for n, t in batch.items()}
        self._draws = Draws(*(field.clone() for field in draw_local(state)))
        self._settle()
        try:
            self._graph = self._record(lambda: update(state, self._batch, self._draws))
        except Exception as error:  # CUDA's, the allocator's, or of what is not allowed inside
            if state.config.cuda_graph == "on" and state.world.size == 1:
                raise
            # the first error where there are two: a broken capture cannot be ended either
            failure = format_exception_only(error.__context__ or error)[0].splitlines()[0]
            print(f"cuda_graph: not captured, {failure}")
        if state.world.any(bool(failure)):
            self.close()
            self._left = math.inf


def why_not(config: TrainConfig, world: World) -> str:
    """Return why the step of a run is not one CUDA graph, or ""."""
    if config.cuda_graph == "off":
        return "asked for"
    if world.device.type != "cuda":
        return f"the device is {world.device.type}, expected cuda"
    if world.size > 1 and config.parallel != "ddp":
        return f"parallel is {config.parallel!r}, expected ddp"
    if world.size > 1 and config.cuda_graph == "auto":
        return f"of {world.size} processes no gain was measured yet (--cuda-graph on tries it)"
    return ""


def describe(state: TrainState) -> str:
    """Return a line for the log: whether the step is one CUDA graph, or why not."""
    asked, reason = state.config.cuda_graph, why_not(state.config, state.world)
    since = "" if asked == "off" else "since "
    return f"cuda_graph: off, {since}{reason}" if reason else f"cuda_graph: on ({asked})"


def stepper(state: TrainState, settle: Work = lambda: None) -> Callable[[Batch], None]:
    """Return what takes a batch and does an optimizer step, as the config asks for it.

    ValueError, with the reason, if cuda_graph is on where the step cannot be one.
    """
    reason = why_not(state.config, state.world)
    if state.config.cuda_graph == "on" and reason:
        raise ValueError(f"cuda_graph is on, but {reason}")
    return partial(train_step, state) if reason else GraphedStep(state, settle)


def capture(work: Work, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """Record `work` on `stream`, without doing it.

    Other threads, a loader's that pins memory or NCCL's watchdog, may meanwhile ask CUDA for what
    would end the capture if this thread did. Collectives are recorded with the rest (torch >= 2.2,
    NCCL >= 2.9.6), once their communicator has been used; no timeout watches them when replayed.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            work()
    except Exception:
        drop_capture(graph, pool, stream.device)
        raise
    return graph


def on_stream(stream: torch.cuda.Stream | None, work: Work) -> None:
    """Do work as a capture will, so that nothing of autograd is tied to the default stream.

    Memory belongs to the stream that it was first used on: another stream would take its own.
    """
    if stream is None:
        work()
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        work()
    current.wait_stream(stream)
