import gc
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS

import pytest
import torch

from tests import tiers
from tests.launching import torchrun  # noqa: F401  (fixture)
from tests.optional import (  # noqa: F401  (hooks)
    pytest_make_collect_report,
    pytest_runtest_call,
    pytest_runtest_setup,
)
from tests.ranks import ranks  # noqa: F401  (fixture)
from tests.tiers import build, heavy, inductor  # noqa: F401  (fixtures)

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="heavy tests, and every case of a grid")


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(config, items):
    for item in items:
        tiers.mark(item)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    chosen = set(items if config.getoption("full") else tiers.fast(items))
    if not config.option.markexpr:  # 22 GiB of memory are asked for by name
        chosen = {item for item in chosen if not item.get_closest_marker("smoke_full")}
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    kept = [item for item in items if item in chosen]
    items[:] = sorted(kept, key=lambda item: "ranks" not in item.keywords)  # the longest first


@pytest.fixture(autouse=True)
def forget_compiled_code(request):
    """Each gpu test begins without compiled code: a function has few recompilations a process."""
    if request.node.get_closest_marker("gpu") and "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """The digits, for runs that only read them."""
    pytest.importorskip("lance")
    from repa_fast.data.digits import prepare_digits

    return str(prepare_digits(tmp_path_factory.mktemp("data") / "digits"))


@pytest.fixture(autouse=True, scope="module")
def keep_what_is_there():
    """Let garbage collection pass over what was imported before: every save collects."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()
