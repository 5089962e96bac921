import contextlib
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from repa_fast.kernels.attention import (
    BACKENDS,
    Backend,
    attention,
    cudnn_graph,
    packed,
    select,
    set_backend,
)
from repa_fast.kernels.attention import selection as selection_module
from repa_fast.kernels.attention.selection import Row, fastest, survey
from repa_fast.models.sit import Attention
from repa_fast.testing import seeded
from repa_fast.train.parallel import KEPT
from tests.kernels.attention import NAMES, ON_CPU, SHAPES, expect_budget, inputs, measured
from tests.kernels.attention_packages import ROOTS, STAND_INS, efficient, efficient_backward
from tests.kernels.table import BF16, DTYPES, F32, F64
from tests.refusals import refused

OPTIONAL = ("cudnn", "fa2", "fa3", "xformers")
PACKED = ("efficient", "cudnn")


def imported():
    return [name for name in sys.modules if name.partition(".")[0] in ROOTS]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that writes files of packages, found before any that is installed."""
    for name in imported():
        monkeypatch.delitem(sys.modules, name)
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [sys.modules.pop(name) for name in imported()])

        def write(files):
            for path, source in files.items():
                (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / path).write_text(source)
            monkeypatch.syspath_prepend(tmp_path)

        yield write


@pytest.fixture
def stand_in(install, monkeypatch):
    """A function that installs a stand-in and lets its backend run on the CPU."""
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    aten = torch.library.Library("aten", "IMPL")
    aten.impl("_efficient_attention_forward", efficient, "CPU")
    aten.impl("_efficient_attention_backward", efficient_backward, "CPU")

    def use(name):
        install(STAND_INS.get(name, {}))
        monkeypatch.setitem(BACKENDS, name, replace(BACKENDS[name], takes=None))
        return BACKENDS[name]

    yield use
    aten._destroy()
    for cached in (cudnn_graph._handle, cudnn_graph._graph):
        cached.cache_clear()


@pytest.mark.parametrize("name", OPTIONAL)
def test_absent_packages_are_not_installed(name, monkeypatch):
    for root in ROOTS:
        monkeypatch.setitem(sys.modules, root, None)
    monkeypatch.setitem(BACKENDS, name, replace(BACKENDS[name], takes=None))
    assert BACKENDS[name].probe() == "not installed"
    args = inputs((2, 2, 4, 8))[:3]
    for call in (lambda: set_backend(name), lambda: attention(*args, backend=name)):
        refused(call, f"'{name}' cannot run: not installed", error=RuntimeError)


@pytest.mark.parametrize(
    "source, reason",
    (
        ("raise OSError('libcudart.so.12: cannot open')", "OSError: libcudart.so.12: cannot open"),
        ("import no_such_binary", "ModuleNotFoundError: No module named 'no_such_binary'"),
        ("from torch import no_such_name", "ImportError: cannot import name 'no_such_name'"),
        ("raise RuntimeError('needs cutlass 4.6\\nor newer')", "RuntimeError: needs cutlass 4.6"),
        ("flash_attn = None", "has no flash_attn_qkvpacked_func"),
    ),
)
def test_broken_packages_say_why(install, source, reason):
    install({"flash_attn_interface.py": source})
    assert reason in BACKENDS["fa3"].probe()
    words = "'fa3' cannot run: flash_attn_interface"
    refused(lambda: set_backend("fa3"), words, error=RuntimeError)


def expect_budget_with(name, args, attention=attention):
    expect_budget(measured(partial(attention, backend=name), *args), args)


@pytest.mark.parametrize("name", ("efficient", *OPTIONAL))
def test_adapters_pass_layout_scale_and_gradients(stand_in, name):
    stand_in(name)
    for shape in SHAPES[:3]:
        expect_budget_with(name, inputs(shape))


@pytest.fixture
def compiled():
    """A function that compiles a layer whole; it also returns the names in its two graphs."""

    def whole(layer):
        names = []

        def keep(graph, _):
            called = (node for node in graph.graph.nodes if node.op == "call_function")
            names.append(Counter(str(node.target) for node in called))
            return make_boxed_func(graph.forward)

        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
        return torch.compile(layer, fullgraph=True, backend=backend), names

    torch.compiler.reset()
    yield whole
    torch.compiler.reset()


@pytest.mark.parametrize("name", ("sdpa", *PACKED))
def test_a_backend_that_packs_leaves_nothing_to_stack(stand_in, compiled, name):
    stand_in(name)
    set_backend(name)
    layer = Attention(48, 2, qk_norm=False, fused_attn=True)
    x, dout = seeded((2, 9, 48), seed=3), seeded((2, 9, 48), seed=4)
    leaves = [x.requires_grad_(), *layer.parameters()]
    call, graphs = compiled(layer)
    got, expected = (torch.autograd.grad(run(x), leaves, dout) for run in (call, layer))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    copies = ("stack", "cat", "clone", "copy", "select_backward", "index_put", "slice_scatter")
    (_, backward) = graphs
    stacked = sum(n for one, n in backward.items() if any(copy in one for copy in copies))
    assert bool(stacked) == (name == "sdpa")
    assert backward["repa_fast.attention_packed_backward.default"] == (name != "sdpa")


@pytest.mark.parametrize("name", PACKED)
def test_selective_checkpointing_does_not_run_it_again(stand_in, monkeypatch, name):
    stand_in(name)
    forward, *rest = packed.KERNELS[name]
    calls = []
    counted = lambda *arguments: calls.append(0) or forward(*arguments)  # noqa: E731
    monkeypatch.setitem(packed.KERNELS, name, (counted, *rest))
    call = partial(attention, backend=name)
    kept = partial(create_selective_checkpoint_contexts, KEPT)
    recomputed = partial(checkpoint, call, use_reentrant=False, context_fn=kept)
    expect_budget(measured(recomputed, *inputs(SHAPES[0])), inputs(SHAPES[0]))
    assert len(calls) == 1


def test_cudnn_builds_a_graph_once_per_layout(stand_in):
    stand_in("cudnn")
    for batch in (2, 2, 3):
        measured(partial(attention, backend="cudnn"), *inputs((batch, 2, 8, 16)))
    assert len(sys.modules["cudnn"].GRAPHS) == 2 * 2


def chosen(asked, dtype=F32, device="cpu"):
    return select(asked, heads=2, tokens=64, head_dim=72, batch=4, dtype=dtype, device=device)


def test_what_no_gpu_has_measured_is_taken_by_name_alone(stand_in, monkeypatch):
    stand_in("cudnn")
    selection = chosen("cudnn")
    assert selection.backend == "cudnn" and "asked for" in selection.reason

    def timed(backends, *arguments, clock):
        return tuple(Row(backend.name, ms=1.0) for backend in backends)

    monkeypatch.setattr(selection_module, "survey", timed)
    selection = chosen("auto", BF16, "cuda")
    left_out = {row.backend: row.left_out for row in selection.rows}
    assert left_out == dict.fromkeys(BACKENDS, "") | {"cudnn": BACKENDS["cudnn"].unproven}
    assert left_out["cudnn"] and selection.backend == "sdpa"


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_gradients_are_refused_with_the_numbers(stand_in, dtype):
    stand_in("cudnn").probe()
    sys.modules["cudnn"].WRONG = 1.05
    numbers = r"'cudnn' cannot run: error of dq is \d\.\d+e-\d+, expected at most \d\.\d+e-\d+"
    refused(lambda: chosen("cudnn", dtype), numbers, error=RuntimeError)


def scaled_gradient(which, factor):
    def run(*args):
        qkv = list(args[:3])
        qkv[which] = qkv[which].view_as(qkv[which])
        qkv[which].register_hook(lambda gradient: factor * gradient)
        return BACKENDS["sdpa"].run(*qkv, args[3])

    return Backend("wrong", run)


def raising(q, k, v, scale):
    raise RuntimeError("no kernel image\nfor this device")


def row_of(backend, dtype=BF16):
    (row,) = survey([backend], (4, 2, 256, 72), dtype, torch.device("cpu"))
    return row


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", range(3))
def test_self_test_finds_a_gradient_one_percent_wrong(which, dtype):
    row = row_of(scaled_gradient(which, 1.01), dtype)
    assert row.worst == NAMES[1 + which] and row.error > row.bound and row.worst in row.left_out


@pytest.mark.parametrize(
    "backend, reason",
    (
        (Backend("broken", raising), "RuntimeError: no kernel image"),
        (Backend("broken", lambda q, k, v, _: (q * k * v).float()), "out is torch.float32"),
        (Backend("broken", lambda q, k, v, _: (q * k * v)[:, :1]), "RuntimeError: Mismatch in"),
        (Backend("broken", lambda q, k, v, _: q * k * v * float("nan")), "is nan, expected at"),
        (BACKENDS["sdpa-cudnn"], "it runs on cuda"),
        (Backend("absent", raising, probe=lambda: "not installed"), "not installed"),
    ),
)
def test_self_test_reports_what_a_backend_does_or_lacks(backend, reason):
    assert reason in row_of(backend).left_out


def test_fastest_of_those_that_pass_is_chosen():
    def clock(backend, args):
        assert args[0].shape == (4, 16, 3, 2, 8)
        if backend.name == "math":
            raise torch.OutOfMemoryError
        return {"sdpa": 2.0, "reference": 1.0}[backend.name]

    candidates = [BACKENDS[name] for name in ("sdpa", "math", "reference")]
    candidates.append(scaled_gradient(0, 1.05))  # never timed
    rows = survey(candidates, (4, 2, 16, 8), F32, torch.device("cpu"), clock)
    selection = fastest(rows, "here")
    assert selection.backend == "reference" and selection.rows == rows
    assert "1.000 ms" in selection.reason and "fastest of 2" in selection.reason
    left_out = {row.backend: row.left_out for row in rows}
    assert left_out["math"] == "out of memory at (4, 16, 3, 2, 8)" and "dq" in left_out["wrong"]
    words = "no backend can run at here: math: out of memory"
    refused(lambda: fastest((rows[1],), "here"), words, error=RuntimeError)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_backend_asked_for_is_self_tested(dtype, backend):
    before = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        selection = chosen(backend, dtype)
    (row,) = selection.rows
    assert selection.backend == row.backend == backend and row.error <= row.bound
    assert f"{row.bound:.1e}" in selection.reason
    assert torch.equal(before, torch.get_rng_state())


def test_auto_on_the_cpu_is_sdpa_and_what_cannot_be_is_refused():
    selection = chosen("auto")
    assert selection.backend == "sdpa" and "cpu" in selection.reason and not selection.rows
    refused(lambda: chosen("flash"), "expected one of auto, sdpa")
    refused(lambda: chosen("fa3", BF16), "'fa3' cannot run: it runs on cuda")
    refused(lambda: chosen("math", F64), "expected one of torch.float32")


def survey_on_cuda(backend, dtype):
    (row,) = survey([BACKENDS[backend]], (2, 16, 256, 72), dtype, torch.device("cuda"))
    return row


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_backend_that_loads_is_within_budget_on_cuda(dtype, backend):
    row = survey_on_cuda(backend, dtype)
    if row.error is None:
        pytest.skip(row.left_out)
    if backend in OPTIONAL and row.left_out:
        pytest.xfail(f"refused: {row.left_out}")
    assert not row.left_out


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_that_loads_compiles_into_one_graph_on_cuda(inductor, backend):
    row = survey_on_cuda(backend, BF16)
    if row.left_out:
        pytest.skip(row.left_out)
    args = [x.cuda() for x in inputs((2, 16, 256, 72), BF16)]
    expect_budget_with(backend, args, torch.compile(attention, fullgraph=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", PACKED)
def test_a_backend_that_packs_is_captured_in_a_cuda_graph(name):
    row = survey_on_cuda(name, BF16)  # which is the warm-up as well
    if row.left_out:
        pytest.skip(row.left_out)
    args = [x.cuda() for x in inputs((2, 16, 256, 72), BF16)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = measured(partial(attention, backend=name), *args)
    graph.replay()
    expect_budget(got, args)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (F32, BF16))
def test_auto_on_cuda_takes_the_fastest_row(dtype):
    shape = {"heads": 16, "tokens": 256, "head_dim": 72, "batch": 8}
    selection = select("auto", **shape, dtype=dtype, device="cuda")
    eligible = [row for row in selection.rows if not row.left_out]
    assert selection.backend == min(eligible, key=lambda row: row.ms).backend
    assert len(selection.rows) == len(BACKENDS) and "fastest" in selection.reason
