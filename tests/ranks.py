"""Two processes that live as long as a test run and do what its tests ask of them.

`ranks(function, *arguments)` calls `function(world, *arguments)` in each of them, inside one
session of repa_fast.distributed, and returns what each returned, by rank. The function is one that
can be imported, its arguments and results can be pickled.
"""

import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback

import pytest

SIZE = 2
TIMEOUT = 300.0
"""Seconds that a case may take before both processes are ended."""


def serve(rank: int, port: int, connection) -> None:
    """Be one of the processes: do the cases that come through the connection until it closes."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": SIZE, "LOCAL_WORLD_SIZE": SIZE}
    own |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TRITON_INTERPRET": 1}
    os.environ.update({name: str(value) for name, value in own.items()})
    import torch

    from repa_fast.backend import dispatch
    from repa_fast.distributed import session

    torch.set_num_threads(1)
    dispatch.use_kernels("reference")  # which is what a CPU takes where nothing interprets
    with session() as world:
        while True:
            try:
                function, arguments = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            try:
                found = (True, function(world, *arguments))
            except BaseException:
                found = (False, traceback.format_exc())
            connection.send_bytes(pickle.dumps(found))
            dispatch.use_kernels("reference")
            if "torch._dynamo" in sys.modules:
                torch.compiler.reset()


class Ranks:
    """The processes; they are started by the first case and, after a failure, by the next one."""

    def __init__(self) -> None:
        self.running: list = []

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for rank in range(SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.running.append((process, ours))

    def close(self) -> None:
        for process, connection in self.running:
            connection.close()
            process.kill()
            process.join()
        self.running = []

    def __call__(self, function, *arguments) -> list:
        if not self.running:
            self.start()
        for _, connection in self.running:
            connection.send_bytes(pickle.dumps((function, arguments)))
        found, end = [], time.monotonic() + TIMEOUT
        for rank, (_, connection) in enumerate(self.running):
            try:
                late = not connection.poll(max(0.0, end - time.monotonic()))
                right, value = (False, "late") if late else pickle.loads(connection.recv_bytes())
            except EOFError:
                right, value = False, "the process has ended"
            if not right:
                self.close()  # the other one may wait for ever
                pytest.fail(f"process {rank}: {value}", pytrace=False)
            found.append(value)
        return found


@pytest.fixture(scope="session")
def ranks():
    """The two processes of this test run."""
    processes = Ranks()
    yield processes
    processes.close()
