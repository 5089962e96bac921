"""Batches ahead of time: one prefetch thread per process and a pool of decode threads."""

import atexit
import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NotRequired, TypedDict

import numpy as np
import torch

from repa_fast.data.dali import DaliDecoder, Decode, choose
from repa_fast.data.dataset import Sample
from repa_fast.data.open import Dataset
from repa_fast.data.order import Consecutive, SampleOrder
from repa_fast.failure import Failure

PREFETCHED_BATCHES = 3

log = logging.getLogger(__name__)


class DataTimeout(Failure):
    """A batch has not come in time."""


class Batch(TypedDict):
    """index int64 (B), moments float32 (B, 2C, h, w), label int64 (B); where an encoder needs it,
    image uint8 (B, 3, R, R), on the CPU or, decoded there, on the GPU; and the columns of features
    that were asked for, by their names."""

    index: torch.Tensor
    moments: torch.Tensor
    label: torch.Tensor
    image: NotRequired[torch.Tensor]


class Loader:
    """Iterates over this process's share of each global batch of steps start..stop - 1.

    Use it as a context manager: its threads are stopped and joined on leaving, and at interpreter
    exit if it was not left, since a Lance call alive then aborts the process.

    Args:
        dataset: where rows come from.
        order: which rows a step takes.
        start, stop: steps, counted from 0.
        rank, world_size: this process's share.
        images: whether batches carry decoded images.
        features: names of columns of features that batches carry as they are stored.
        num_workers: decode threads.
        pin_memory: page-locked batches for asynchronous copies to a GPU.
        skip_bad: replace a bad row by the next good one instead of raising.
        decode: who decodes images: "torch" is Pillow on the CPU; "dali-cpu"; "dali-gpu", whose
            images are on `device`; "auto" takes dali-gpu on CUDA where DALI is there, else torch.
        device: the run's.
        timeout: seconds to wait for a batch; 0 waits for ever.

    Attributes:
        skipped: what was wrong with each bad row that was replaced.

    Raises:
        ValueError: a decoder that cannot be used here is asked for.
        DataTimeout: while iterating, a batch has not come in time. The threads are left as they
            are, since what they wait for may never come.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: SampleOrder | Consecutive,
        *,
        start: int,
        stop: int,
        rank: int = 0,
        world_size: int = 1,
        images: bool = True,
        features: Sequence[str] = (),
        num_workers: int = 1,
        pin_memory: bool = False,
        skip_bad: bool = False,
        decode: Decode = "auto",
        device: torch.device | str = "cpu",
        timeout: float = 0.0,
    ) -> None:
        self.skipped: list[str] = []
        self._timeout = timeout or None
        self._uri = dataset.uri
        decoder: AbstractContextManager = nullcontext()
        device = torch.device(device)
        if images and (chosen := choose(decode, device)[0]) != "torch":
            decoder = DaliDecoder(
                dataset.metadata.resolution, num_workers, device if chosen == "dali-gpu" else None
            )
        self._queue: queue.Queue = queue.Queue(PREFETCHED_BATCHES)
        self._stopped = threading.Event()
        steps = (order.rows(step, rank, world_size) for step in range(start, stop))
        read = partial(
            read_batch,
            dataset,
            images=images,
            features=features,
            pin_memory=pin_memory,
            skipped=self.skipped if skip_bad else None,
        )
        self._thread = threading.Thread(
            target=_prefetch,
            args=(self._queue, self._stopped, steps, read, num_workers, decoder),
            name="repa-fast-prefetch",
            daemon=True,
        )
        self._close = weakref.finalize(self, _stop, self._stopped, self._queue, self._thread)
        # before DALI, which at exit destroys pipelines that may still be running
        atexit.register(self._close)
        self._thread.start()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        while self._close.alive:
            try:
                item = self._queue.get(timeout=self._timeout)
            except queue.Empty:
                self._stopped.set()
                self._close.detach()
                raise DataTimeout(
                    f"no batch from {self._uri} within {self._timeout:g} s (--data-timeout)"
                ) from None
            if item is None or isinstance(item, BaseException):
                self.close()
            if isinstance(item, BaseException):
                raise item
            if item is not None:
                for tensor in item.values():
                    if tensor.is_cuda:  # its memory is kept until the stream is done with it
                        tensor.record_stream(torch.cuda.current_stream(tensor.device))
                yield item

    def close(self) -> None:
        """Stop and join the threads; harmless when called again."""
        self._close()
        atexit.unregister(self._close)


def read_batch(
    dataset: Dataset,
    indices: np.ndarray,
    *,
    pool: ThreadPoolExecutor | None = None,
    images: bool = True,
    features: Sequence[str] = (),
    pin_memory: bool = False,
    skipped: list[str] | None = None,
    decoder: DaliDecoder | None = None,
) -> Batch:
    """Read rows as tensors; images are decoded by `decoder`, or by Pillow, in `pool` or here.

    A bad row raises ValueError; or, given a list `skipped`, is described there and the next good
    row takes its place, which is a function of the row alone.
    """
    run = map if pool is None else pool.map
    fetch = partial(dataset.fetch, images=images, features=features)
    fetched = fetch(indices)
    samples, pixels, reason = None, None, ""
    if images and decoder is not None:
        try:
            samples, pixels = decoder.decode(dataset, fetched, run)
        except ValueError as error:  # a row is bad or unusual: row by row, by Pillow
            reason = str(error)
    if samples is None:
        known = len(skipped or ())
        samples = list(run(partial(_decode, dataset, fetch, skipped), fetched))
        if reason and len(skipped or ()) == known:
            log.warning("a batch is decoded by Pillow, not DALI: %s", reason)
    batch: Batch = {
        "index": torch.tensor([sample["index"] for sample in samples]),
        "moments": _stacked(sample["moments"] for sample in samples),
        "label": torch.tensor([sample["label"] for sample in samples]),
    }
    if images:
        batch["image"] = _stacked(s["image"] for s in samples) if pixels is None else pixels
    for column in samples[0].get("features", ()):
        batch[column] = _stacked(sample["features"][column] for sample in samples)
    if pin_memory:
        batch = {name: t if t.is_cuda else t.pin_memory() for name, t in batch.items()}
    return batch


def _stacked(arrays: Iterable[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(list(arrays)))


def _decode(dataset: Dataset, fetch: Callable, skipped: list[str] | None, fetched: tuple) -> Sample:
    if skipped is None:
        return dataset.decode(fetched)
    first = int(fetched[0])
    for step in range(len(dataset)):
        try:
            if step:
                fetched = fetch(np.array([(first + step) % len(dataset)]))[0]
            return dataset.decode(fetched)
        except ValueError as error:
            if not skipped:
                log.warning("a bad sample is replaced by the next good one: %s", error)
            skipped.append(str(error))
    raise ValueError(f"{dataset.uri} has no good row")


def _prefetch(
    out: queue.Queue,
    stopped: threading.Event,
    steps: Iterator[np.ndarray],
    read: Callable[..., Batch],
    num_workers: int,
    decoder: AbstractContextManager,
) -> None:
    """Put every batch, then None, or the exception that ended the thread."""
    try:
        with (
            ThreadPoolExecutor(num_workers, thread_name_prefix="repa-fast-decode") as pool,
            decoder as whole,
        ):
            for indices in steps:
                if stopped.is_set():
                    return
                if not _put(out, stopped, read(indices, pool=pool, decoder=whole)):
                    return
        _put(out, stopped, None)
    except BaseException as error:  # a panic in Lance is no Exception
        _put(out, stopped, error)


def _put(out: queue.Queue, stopped: threading.Event, item: object) -> bool:
    while not stopped.is_set():
        try:
            out.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False


def _stop(stopped: threading.Event, out: queue.Queue, thread: threading.Thread) -> None:
    stopped.set()
    if thread is not threading.current_thread() and thread.ident is not None:
        thread.join()
    while not out.empty():
        out.get_nowait()
