"""Batches ahead of time: one prefetch thread per process and a pool of decode threads."""

import queue
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NotRequired, TypedDict

import numpy as np
import torch

from repa_fast.data.dataset import LatentDataset
from repa_fast.data.images import decode
from repa_fast.data.order import SampleOrder

PREFETCHED_BATCHES = 3


class Batch(TypedDict):
    """index int64 (B), moments float32 (B, 2C, h, w), label int64 (B), and, where an encoder needs
    it, image uint8 (B, 3, R, R)."""

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
        num_workers: decode threads.
        pin_memory: page-locked batches for asynchronous copies to a GPU.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        order: SampleOrder,
        *,
        start: int,
        stop: int,
        rank: int = 0,
        world_size: int = 1,
        images: bool = True,
        num_workers: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self._queue: queue.Queue = queue.Queue(PREFETCHED_BATCHES)
        self._stopped = threading.Event()
        steps = (order.rows(step, rank, world_size) for step in range(start, stop))
        read = partial(read_batch, dataset, images=images, pin_memory=pin_memory)
        self._thread = threading.Thread(
            target=_prefetch,
            args=(self._queue, self._stopped, steps, read, num_workers),
            name="repa-fast-prefetch",
            daemon=True,
        )
        self._close = weakref.finalize(self, _stop, self._stopped, self._queue, self._thread)
        self._thread.start()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        while self._close.alive:
            item = self._queue.get()
            if item is None or isinstance(item, BaseException):
                self.close()
            if isinstance(item, BaseException):
                raise item
            if item is not None:
                yield item

    def close(self) -> None:
        """Stop and join the threads; harmless when called again."""
        self._close()


def read_batch(
    dataset: LatentDataset,
    indices: np.ndarray,
    *,
    pool: ThreadPoolExecutor | None = None,
    images: bool = True,
    pin_memory: bool = False,
) -> Batch:
    """Rows as tensors; images are decoded by `pool`, or here without one."""
    rows = dataset.rows(indices, images=images)
    batch: Batch = {
        "index": torch.from_numpy(rows["index"]),
        "moments": torch.from_numpy(rows["moments"].copy()),
        "label": torch.from_numpy(rows["label"].copy()),
    }
    if images:
        names = [f"{dataset.uri} row {index}" for index in indices]
        resolutions = [dataset.metadata.resolution] * len(indices)
        run = map if pool is None else pool.map
        batch["image"] = torch.from_numpy(
            np.stack(list(run(decode, rows["image"], resolutions, names)))
        )
    if pin_memory:
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return batch


def _prefetch(out: queue.Queue, stopped: threading.Event, steps, read, num_workers: int) -> None:
    """Thread body: every batch, then None; or the exception that ended it."""
    try:
        with ThreadPoolExecutor(num_workers, thread_name_prefix="repa-fast-decode") as pool:
            for indices in steps:
                if stopped.is_set() or not _put(out, stopped, read(indices, pool=pool)):
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
