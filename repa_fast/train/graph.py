"""The training step as one CUDA graph: one launch instead of a thousand."""

from collections.abc import Callable
from functools import partial

import torch

from repa_fast.data.loader import Batch
from repa_fast.diffusion.draws import Draws
from repa_fast.train.optim import learning_rate
from repa_fast.train.state import TrainState
from repa_fast.train.step import draw_local, train_step, update

FIRST_STEPS = 3
"""Steps before the capture: they compile, choose algorithms and make the optimizer's state."""

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""What to do -> what does it again, on the memory it was recorded with."""


class GraphedStep:
    """Takes the place of `train_step`, with the same results.

    Batch and draws are copied to where the graph reads them; the learning rate lies on the device.
    All else is recorded once, so that nothing may change between steps but the values of tensors.

    Raises:
        ValueError: not on a CUDA device, several processes, or a loss scaler, whose state is
            replaced in every step.
    """

    def __init__(self, state: TrainState, record: Record | None = None) -> None:
        if record is None and state.world.device.type != "cuda":
            raise ValueError(f"cuda_graph is set on {state.world.device.type}, expected cuda")
        if state.world.size > 1:
            raise ValueError(f"cuda_graph is set with {state.world.size} processes, expected one")
        if state.scaler.is_enabled():
            raise ValueError("cuda_graph is set with mixed_precision fp16, expected bf16 or no")
        self._state = state
        on_cuda = state.world.device.type == "cuda"
        self._stream = torch.cuda.Stream(state.world.device) if on_cuda else None
        self._record = record or partial(capture, stream=self._stream)
        self._left = FIRST_STEPS
        self._inputs: tuple[Batch, Draws] | None = None
        self._replay: Callable[[], None] = lambda: None

    def __call__(self, batch: Batch) -> None:
        """One optimizer step; counts it in state.step."""
        state = self._state
        if self._left:
            self._left -= 1
            on_stream(self._stream, lambda: train_step(state, batch))
            return
        state.optimizer.set_lr(learning_rate(state.config, state.step))
        draws = draw_local(state)
        if self._inputs is None:
            device = state.world.device
            held = {n: torch.empty_like(tensor, device=device) for n, tensor in batch.items()}
            own = Draws(*(field.clone() for field in draws))
            self._inputs = held, own
            self._replay = self._record(lambda: update(state, held, own))
        held, own = self._inputs
        for name, tensor in held.items():
            tensor.copy_(batch[name], non_blocking=True)
        torch._foreach_copy_(list(own), list(draws))
        self._replay()
        state.step += 1


def stepper(state: TrainState) -> Callable[[Batch], None]:
    """What takes a batch and does an optimizer step, as the config asks for it."""
    return GraphedStep(state) if state.config.cuda_graph else partial(train_step, state)


def capture(work: Callable[[], None], stream: torch.cuda.Stream) -> Callable[[], None]:
    """Record `work` on `stream`, without doing it.

    Other threads, a loader's that pins memory or one that writes a checkpoint, may meanwhile ask
    CUDA for what would end the capture if this thread did.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph.replay


def on_stream(stream: torch.cuda.Stream | None, work: Callable[[], None]) -> None:
    """As a capture will run it, so that nothing of autograd is tied to the default stream.

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
