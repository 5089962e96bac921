import concurrent.futures
import importlib.util
import multiprocessing
from functools import partial
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

from repa_fast import ops
from tests.kernels import evaluate
from tests.kernels.table import EVERYWHERE


@pytest.fixture(autouse=True)
def nan_filled_empty(monkeypatch):
    """Uninitialised memory reads as NaN, so an element that no kernel wrote fails its test."""
    evaluate.poison_memory(monkeypatch.setattr)


def why_no_interpreter():
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if Version(version("triton")) < Version("3.7") and Version(version("numpy")) >= Version("2.4"):
        return "the interpreter of Triton 3.6 needs numpy < 2.4"
    return None


@pytest.fixture(scope="session")
def can_interpret():
    """Skips where Triton's interpreter cannot run."""
    if reason := why_no_interpreter():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def interpreter(can_interpret):
    """A process under TRITON_INTERPRET=1; `interpreter(function, *arguments)` runs there."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        # In the environment from the start: importing Triton decides how its functions run.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(evaluate.poison_memory).result()
        pool.submit(evaluate.round_to_nearest).result()
        packed = partial(pool.submit, evaluate.call_packed)
        yield lambda *call: evaluate.unpack(packed(evaluate.pack(call)).result())


@pytest.fixture(params=EVERYWHERE)
def run(request):
    """The reference, the Triton kernels interpreted on the CPU, and these on a GPU, in turn."""
    interpreted = request.param == "interpreter"
    process = request.getfixturevalue("interpreter") if interpreted else None
    return evaluate.Runner(request.param, process)


@pytest.fixture
def cuda():
    """The first device, where the CUDA library is built."""
    device = torch.device("cuda", 0)
    if reason := ops.why_not_cuda(device):
        pytest.fail(reason)
    return device


@pytest.fixture(autouse=True)
def default_attention_backend():
    yield
    ops.set_attention_backend("sdpa")
