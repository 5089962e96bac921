import concurrent.futures
import importlib.util
import multiprocessing
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

from tests.kernels.evaluate import (
    ALLOCATORS,
    call_packed,
    evaluate,
    evaluate_packed,
    nan_filled,
    pack,
    poison_memory,
    round_to_nearest,
    unpack,
)


@pytest.fixture(autouse=True)
def nan_filled_empty(monkeypatch):
    """Uninitialised memory reads as NaN, so an element that no kernel wrote fails its test."""
    for owner, name in ALLOCATORS:
        monkeypatch.setattr(owner, name, nan_filled(getattr(owner, name)))


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
            pool.submit(poison_memory).result()
        pool.submit(round_to_nearest).result()

        def call(function, *arguments):
            if function is evaluate:
                return unpack(pool.submit(evaluate_packed, pack(arguments)).result())
            return unpack(pool.submit(call_packed, pack((function, arguments))).result())

        yield call


@pytest.fixture(params=["reference", "interpreter", pytest.param("triton", marks=pytest.mark.gpu)])
def run(request):
    """run(op, arguments, upstream=None, **options) -> (outputs, gradients), see `evaluate`.

    Once with the reference, once with the Triton kernels interpreted on the CPU, once with them on
    a GPU; tensors go in and come out on the CPU.
    """

    def reference(op, arguments, upstream=None, **options):
        return evaluate(op, arguments, upstream, options | {"implementation": "reference"})

    def interpreted(op, arguments, upstream=None, **options):
        options = options | {"implementation": "triton"}
        interpreter = request.getfixturevalue("interpreter")
        return interpreter(evaluate, op, arguments, upstream, options)

    def on_gpu(op, arguments, upstream=None, **options):
        options = options | {"implementation": "triton"}
        arguments, upstream = to("cuda", arguments), to("cuda", upstream)
        return to("cpu", evaluate(op, arguments, upstream, options))

    return {"reference": reference, "interpreter": interpreted, "triton": on_gpu}[request.param]


def to(device, values):
    """Tensors in nested tuples, lists and dicts on `device`, with their strides."""
    if isinstance(values, torch.Tensor):
        # whole storage, so that a chunk stays a strided chunk
        moved = torch.empty(0, dtype=values.dtype, device=device)
        storage = values.untyped_storage()
        source = torch.empty(0, dtype=values.dtype, device=values.device).set_(storage)
        return moved.set_(
            source.to(device).untyped_storage(),
            values.storage_offset(),
            values.shape,
            values.stride(),
        )
    if isinstance(values, dict):
        return {name: to(device, value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(to(device, value) for value in values)
    return values
