"""COUNT processes that end with an open loader, each in one of the ways of ENDS, as they should.

python -m tests.data.ending URI DECODE COUNT. Nothing forks after lance is imported: the children
import it, each for itself.
"""

import os
import signal
import sys
from pathlib import Path

import numpy
import torch  # noqa: F401  (by all children at once)

ENDS = (0, 3, 1, 5, -signal.SIGTERM, 0)
FORKS = ("os.fork", "os.forkpty", "os.posix_spawn", "subprocess.Popen", "os.system")


def no_fork(event, arguments):
    if event in FORKS:
        os.write(2, f"{event} after lance is imported\n".encode())
        os._exit(99)


def opened(uri, decode):
    """The batches of an open loader, so large that exiting meets a read or DALI at work."""
    from repa_fast.data.dataset import LatentDataset
    from repa_fast.data.loader import Loader

    dataset, images = LatentDataset(uri), decode == "dali-cpu"
    size = 400 if images else 1000

    class Large:
        def rows(self, step, rank, world_size):
            return numpy.arange(size) % len(dataset)

    sys.addaudithook(no_fork)
    options = {"num_workers": 2, "images": images, "decode": decode}
    loader = Loader(dataset, Large(), start=0, stop=10**6, **options)
    name, metadata = ("image" if images else "moments"), dataset.metadata
    side = metadata.resolution
    shape = (size, *((3, side, side) if images else metadata.moments_shape))
    return loader, iter(loader), name, shape


def child(number, uri, decode):
    way = number % len(ENDS)
    if way == 2:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    global loader, batches, kept  # they are there until the interpreter ends
    loader, batches, name, shape = opened(uri, decode)
    for _ in range(1 + way):
        assert next(batches)[name].shape == shape
    for task in os.listdir("/proc/self/task"):
        children = Path(f"/proc/self/task/{task}/children").read_text()
        assert not children, children
    if way == 1:
        sys.exit(3)
    if way == 2:
        raise RuntimeError
    if way == 3:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
    if way in (3, 4):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    if way == 5:
        try:
            for _ in batches:
                raise RuntimeError
        except RuntimeError as error:
            kept = error


def main(uri, decode, count):
    assert "lance" not in sys.modules
    codes, running = [], []
    for number in range(count):
        if (process := os.fork()) == 0:
            signal.alarm(120)
            return child(number, uri, decode)
        running.append(process)
        if len(running) == 3 or number == count - 1:
            codes += [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in running]
            running = []
    assert codes == [ENDS[number % len(ENDS)] for number in range(count)], codes
    print("ended as they should:", count)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
