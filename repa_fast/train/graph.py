"""The training step as one CUDA graph: one launch instead of two thousand."""

import math
from collections.abc import Callable
from functools import partial

import torch

from repa_fast.configs.config import TrainConfig
from repa_fast.data.loader import Batch
from repa_fast.diffusion.draws import Draws
from repa_fast.distributed import World
from repa_fast.train.state import TrainState
from repa_fast.train.step import draw_local, set_rates, train_step, update

FIRST_STEPS = 3
"""Steps before the capture: they compile, choose algorithms and make the optimizer's state."""

Work = Callable[[], None]


class GraphedStep:
    """Takes the place of `train_step`, with the same results.

    Batch and draws are copied to where the graph reads them; the rates of learning and of the EMAs
    lie on the device. All else is recorded once, so that nothing may change between steps but the
    values of tensors.
    Where cuda_graph is auto, a capture that fails is one line, and steps are taken without it.

    Args:
        state: of a run that `why_not` has nothing against.
        record: takes what to do, and returns what does it again, on the memory it was recorded
            with; by default a CUDA graph.
    """

    def __init__(self, state: TrainState, record: Callable[[Work], Work] | None = None) -> None:
        self._state = state
        on_cuda = state.world.device.type == "cuda"
        self._stream = torch.cuda.Stream(state.world.device) if on_cuda else None
        self._record = record or partial(capture, stream=self._stream)
        self._left: float = FIRST_STEPS  # steps to take without a graph
        self._inputs: tuple[Batch, Draws] | None = None

    def __call__(self, batch: Batch) -> None:
        """Take one optimizer step; count it in state.step."""
        state = self._state
        if not self._left and self._inputs is None:
            self._capture(batch)
        if self._left:
            self._left -= 1
            on_stream(self._stream, lambda: train_step(state, batch))
            return
        set_rates(state)
        draws = draw_local(state)
        held, own = self._inputs
        for name, tensor in held.items():
            tensor.copy_(batch[name], non_blocking=True)
        torch._foreach_copy_(list(own), list(draws))
        self._replay()
        state.step += 1

    def _capture(self, batch: Batch) -> None:
        """Record the step, or take every step as the first ones."""
        state, device = self._state, self._state.world.device
        held = {n: torch.empty_like(tensor, device=device) for n, tensor in batch.items()}
        own = Draws(*(field.clone() for field in draw_local(state)))
        try:
            self._replay = self._record(lambda: update(state, held, own))
            self._inputs = held, own
        except Exception as error:  # CUDA's, the allocator's, or of what is not allowed inside
            if state.config.cuda_graph != "auto":
                raise
            print(f"cuda_graph: not captured, {type(error).__name__}: {error}".splitlines()[0])
            self._left = math.inf


def why_not(config: TrainConfig, world: World, autocast_dtype: torch.dtype | None) -> str:
    """Return why the step of a run cannot be one CUDA graph, or ""."""
    if world.device.type != "cuda":
        return f"the device is {world.device.type}, expected cuda"
    if world.size > 1:
        return f"there are {world.size} processes, expected one"
    if autocast_dtype == torch.float16:  # its scaler's state is replaced in every step
        return "mixed_precision is fp16, expected bf16 or no"
    if config.align_decay != "constant":
        return f"align_decay is {config.align_decay!r}, expected constant: a graph keeps numbers"
    return ""


def describe(state: TrainState) -> str:
    """Return a line for the log: whether the step is one CUDA graph, or why not."""
    asked = state.config.cuda_graph
    reason = why_not(state.config, state.world, state.autocast_dtype)
    against = "asked for" if asked == "off" else reason and f"since {reason}"
    return f"cuda_graph: off, {against}" if against else f"cuda_graph: on ({asked})"


def stepper(state: TrainState) -> Callable[[Batch], None]:
    """Return what takes a batch and does an optimizer step, as the config asks for it.

    Raises:
        ValueError: cuda_graph is on where the step cannot be one, with the reason.
    """
    asked = state.config.cuda_graph
    reason = why_not(state.config, state.world, state.autocast_dtype)
    if asked == "on" and reason:
        raise ValueError(f"cuda_graph is on, but {reason}")
    return partial(train_step, state) if asked == "off" or reason else GraphedStep(state)


def capture(work: Work, stream: torch.cuda.Stream) -> Work:
    """Record `work` on `stream`, without doing it.

    Other threads, a loader's that pins memory or one that writes a checkpoint, may meanwhile ask
    CUDA for what would end the capture if this thread did.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph.replay


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
