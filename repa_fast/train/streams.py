"""Where encoders run on a GPU: in turn with the rest of the step, or beside the optimizer."""

from collections.abc import Callable, Iterable

import torch

from repa_fast.data.loader import Batch

Encode = Callable[[torch.Tensor], list[torch.Tensor]]


class InTurn:
    """Encoders run where their features are asked for."""

    def receive(self, batch: Batch, device: torch.device) -> Batch:
        """The batch on the device."""
        return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}

    def features(self, encode: Encode, images: torch.Tensor) -> list[torch.Tensor]:
        """encode(images)."""
        return encode(images)

    def backward_is_done(self) -> None:
        """What is asked of the device from here on is the optimizer's."""


class Beside:
    """Encoders run on a CUDA stream of their own, as soon as the step before is at its optimizer.

    The host is ahead of the device, since a step waits for nothing; so the next step's encoders are
    asked for while this one's optimizer has yet to begin. The optimizer is bound by memory, the
    encoders by arithmetic.

    Raises:
        ValueError: not a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(f"encoder_stream is set on {device.type}, expected cuda")
        self._stream = torch.cuda.Stream(device)
        self._optimizer_begins = torch.cuda.Event()
        self._received = False

    def receive(self, batch: Batch, device: torch.device) -> Batch:
        """The batch on the device, from the host or finished there, as a loader hands it over."""
        with torch.cuda.stream(self._stream):
            received = InTurn().receive(batch, device)
        self._hand_over(received.values())
        self._received = True
        return received

    def features(self, encode: Encode, images: torch.Tensor) -> list[torch.Tensor]:
        """encode(images), for the current stream.

        Images that were not received may have been made on the current stream, and are waited for.
        """
        if self._received:
            self._stream.wait_event(self._optimizer_begins)
        else:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            features = encode(images)
        self._hand_over(features)
        return features

    def backward_is_done(self) -> None:
        """The encoders of the next step may begin."""
        self._optimizer_begins.record()
        self._received = False

    def _hand_over(self, tensors: Iterable[torch.Tensor]) -> None:
        """The current stream waits for them, and their memory for the current stream."""
        current = torch.cuda.current_stream()
        current.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(current)
