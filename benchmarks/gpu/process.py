"""Run the module of an item and end: `python -m benchmarks.gpu.process MODULE [ARGS...]`.

At exit torch waits 300 s for the workers that compile for it, and with Python 3.12 these now and
then wait for one another for ever. So they are killed: by then there is nothing left to compile.
"""

import logging
import runpy
import sys


def main() -> None:
    """Run MODULE as `python -m MODULE ARGS...` would."""
    module, sys.argv = sys.argv[1], sys.argv[1:]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        end_compile_workers()


def end_compile_workers() -> None:
    """Kill the processes in which Inductor compiles; their own workers see it and end."""
    found = sys.modules.get("torch._inductor.async_compile")
    logging.getLogger("torch._inductor.compile_worker.subproc_pool").disabled = True
    for pool in list(getattr(found, "_pool_set", ())):
        process = getattr(pool, "process", None)
        if process is not None:
            pool.running = False  # torch has nothing to shut down then
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
