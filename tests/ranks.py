"""Processes that live as long as a test run and do what its tests ask of them.

`ranks(function, *arguments)` calls `function(world, *arguments)` in each of two, inside one session
of repa_fast.distributed, and returns what each returned, by rank; with `size=4` in each of four.
The function is one that can be imported, its arguments and results can be pickled. CPU tensors take
the reference implementations, and `dispatch.use_kernels("triton")` interprets kernels. A case that
fails ends its processes, so that the next one begins with new ones.
"""

import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import socket
import sys
import time
import traceback

import pytest
import torch

from repa_fast.backend import dispatch
from repa_fast.distributed import World, session

SIZE = 2
TIMEOUT = 120.0
"""Seconds that a process waits for another one."""
GRACE = 5.0
"""Seconds that the others have for their answers, after one failed or TIMEOUT is over."""


def serve(rank: int, size: int, port: int, connection) -> None:
    """Be one of the processes: do the cases that come through the connection until it closes."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    own |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, dispatch.VARIABLE: "reference"}
    os.environ.update({name: str(value) for name, value in own.items()})
    torch.set_num_threads(1)
    with session(TIMEOUT) as world:
        while True:
            try:
                request = connection.recv_bytes()
            except EOFError:
                return
            connection.send_bytes(answer(world, request))


def answer(world: World, request: bytes) -> bytes:
    """Do a case; return whether it went well, and its result or what it raised, pickled."""
    torch.manual_seed(0)
    dispatch.use_kernels(None)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    try:
        function, arguments = pickle.loads(request)
        gc.collect()
        gc.freeze()  # every save collects: let it pass over what was imported
        return pickle.dumps((True, function(world, *arguments)))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))


class Group:
    """Processes of one session."""

    def __init__(self, size: int) -> None:
        self.processes, self.connections = [], []
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")  # importing Triton decides how its functions run
            for rank in range(size):
                ours, theirs = context.Pipe()
                arguments = (rank, size, port, theirs)
                process = context.Process(target=serve, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self.processes.append(process)
                self.connections.append(ours)

    def close(self) -> None:
        for process, connection in zip(self.processes, self.connections, strict=True):
            connection.close()
            process.kill()
            process.join()

    def ask(self, request: bytes) -> tuple[dict[int, object], dict[int, str]]:
        """Return what processes returned by rank, and what is wrong with the others, in order."""
        for connection in self.connections:
            with contextlib.suppress(BrokenPipeError):  # receive() will say that it has ended
                connection.send_bytes(request)
        found, wrong = {}, {}
        end = time.monotonic() + TIMEOUT + GRACE
        waiting = set(self.connections)
        while waiting:
            left = max(0.0, end - time.monotonic())
            ready = multiprocessing.connection.wait(waiting, left)
            for connection in ready or waiting:
                rank = self.connections.index(connection)
                right, value = self.receive(rank) if ready else (False, "no answer")
                (found if right else wrong)[rank] = value
            waiting -= set(ready or waiting)
            if wrong:  # the others may wait for this one
                end = min(end, time.monotonic() + GRACE)
        return found, wrong

    def receive(self, rank: int) -> tuple[bool, object]:
        try:
            return pickle.loads(self.connections[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            self.processes[rank].join()
            return False, f"it has ended, with status {self.processes[rank].exitcode}"


class Ranks:
    """Two processes, and for a while more of them; they start with the first case that asks."""

    def __init__(self) -> None:
        self.groups: dict[int, Group] = {}

    def close(self, *sizes: int) -> None:
        for size in sizes or list(self.groups):
            self.groups.pop(size).close()

    def __call__(self, function, *arguments, size: int = SIZE) -> list:
        if size not in self.groups:
            for other in self.groups.keys() - {SIZE}:
                self.close(other)
            self.groups[size] = Group(size)
        wrong = "interrupted"
        try:
            found, wrong = self.groups[size].ask(pickle.dumps((function, arguments)))
        finally:
            if wrong:
                self.close(size)
        if wrong:
            said = "\n".join(f"process {rank} of {size}: {what}" for rank, what in wrong.items())
            pytest.fail(said, pytrace=False)
        return [found[rank] for rank in range(size)]


@pytest.fixture(scope="session")
def ranks():
    """`ranks(function, *arguments)`, for what takes several processes."""
    with contextlib.closing(Ranks()) as processes:
        yield processes
