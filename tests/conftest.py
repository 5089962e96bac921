import gc
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS

import pytest
import torch

from tests.optional import (  # noqa: F401  (hooks)
    pytest_make_collect_report,
    pytest_runtest_call,
    pytest_runtest_setup,
)

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != "test_smoke.py")  # the longest test goes first
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def forget_compiled_code(request):
    """Each gpu test begins without compiled code: a function has few recompilations a process."""
    if request.node.get_closest_marker("gpu") and "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def pytest_collection_finish():
    gc.freeze()  # a save collects garbage: it need not look at all that was imported


def pytest_sessionfinish():
    gc.unfreeze()
