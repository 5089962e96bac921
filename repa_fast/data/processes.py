"""What the processes of a preparation have in common; they meet in the file system alone."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def own_device() -> torch.device:
    """The CPU, or this process's GPU, which becomes the current one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def watched() -> bool:
    """Whether someone looks at the output."""
    return sys.stdout.isatty()


@contextmanager
def progress_bar(description: str, shown: bool) -> Iterator[Callable]:
    """progress(total) -> advance_to(done): a bar with images/s and the time that is left."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = [
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"), Remaining(),
    ]  # fmt: skip
    with Progress(*columns, disable=not (shown and watched())) as bar:
        task = bar.add_task(description, total=None, rate="")

        def start(total: int | None) -> Callable[[int], None]:
            bar.update(task, total=total)

            def advance(done: int) -> None:
                speed = bar.tasks[0].speed
                bar.update(task, completed=done, rate=f"{speed:.0f} images/s" if speed else "")

            return advance

        yield start
