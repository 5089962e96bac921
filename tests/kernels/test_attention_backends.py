import contextlib
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from repa_fast.kernels.attention import BACKENDS, Backend, attention, select, set_backend
from repa_fast.kernels.attention.selection import fastest, survey
from tests.kernels.attention import NAMES, ON_CPU, SHAPES, expect_budget, inputs, measured
from tests.kernels.table import BF16, DTYPES, F32, F64
from tests.refusals import refused

OPTIONAL = ("fa2", "fa3", "fa4", "xformers")

# Stand-ins with the packages' signatures, on (B, N, H, K).
MATHS = """
import torch

def swap(*tensors):
    return tuple(x.transpose(1, 2) for x in tensors)

def forward(q, k, v, scale, padding=0):
    q, k, v = swap(q, k, v)
    scores = scale * (q @ k.mT)
    lse = torch.nn.functional.pad(scores.logsumexp(-1), (0, padding))
    return (scores.softmax(-1) @ v).transpose(1, 2), lse

def backward(grad, out, lse, q, k, v, scale, wrong=1.0):
    q, k, v, out, grad = swap(q, k, v, out, grad)
    p = (scale * (q @ k.mT) - lse[..., None]).exp()
    ds = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * scale
    return swap(wrong * (ds @ k), ds.mT @ q, p.mT @ grad)
"""
FA4 = """
WRONG = 1.0
HEAD_DIMS = set()

def _flash_attn_fwd(q, k, v, *, softmax_scale, return_lse):
    HEAD_DIMS.add(q.shape[-1])
    return *forward(q, k, v, softmax_scale), None, None, None

def _flash_attn_bwd(q, k, v, out, dout, lse, *, softmax_scale, deterministic):
    return backward(dout, out, lse, q, k, v, softmax_scale, WRONG)
"""
XFORMERS = """
def memory_efficient_attention_forward_requires_grad(q, k, v, *, scale):
    return forward(q, k, v, scale, padding=5)

def memory_efficient_attention_backward(grad, out, lse, q, k, v, *, scale):
    return backward(grad, out, lse, q, k, v, scale)
"""
FLASH = "def flash_attn_func(q, k, v, *, softmax_scale, deterministic):\n    return "
STAND_INS = {
    "fa2": {
        "flash_attn/__init__.py": "",
        "flash_attn/flash_attn_interface.py": f"{MATHS}{FLASH}forward(q, k, v, softmax_scale)[0]",
    },
    "fa3": {"flash_attn_interface.py": f"{MATHS}{FLASH}forward(q, k, v, softmax_scale)"},
    # no flash_attn/__init__.py: the wheel makes a namespace package
    "fa4": {"flash_attn/cute/interface.py": MATHS + FA4},
    "xformers": {
        "xformers/_cpp_lib.py": "_cpp_library_load_exception = None",
        "xformers/ops/fmha.py": MATHS + XFORMERS,
    },
}
ROOTS = ("flash_attn", "flash_attn_interface", "xformers")


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

    def use(name):
        install(STAND_INS[name])
        monkeypatch.setitem(BACKENDS, name, replace(BACKENDS[name], takes=None))
        return BACKENDS[name]

    return use


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
        ("flash_attn = None", "has no flash_attn_func"),
    ),
)
def test_broken_packages_say_why(install, source, reason):
    install({"flash_attn_interface.py": source})
    assert reason in BACKENDS["fa3"].probe()
    words = "'fa3' cannot run: flash_attn_interface"
    refused(lambda: set_backend("fa3"), words, error=RuntimeError)


def test_xformers_without_its_binary_says_why(install):
    failure = "class Failure:\n    def __str__(self):\n        return 'built for\\n  torch 2.10'\n"
    lib = {"xformers/_cpp_lib.py": failure + "_cpp_library_load_exception = Failure()"}
    install(STAND_INS["xformers"] | lib)
    assert BACKENDS["xformers"].probe() == "its binary does not load: built for torch 2.10"


def expect_budget_with(name, args, attention=attention):
    expect_budget(measured(partial(attention, backend=name), *args), args)


@pytest.mark.parametrize("name", OPTIONAL)
def test_adapters_pass_layout_scale_and_gradients(stand_in, name):
    stand_in(name)
    for shape in SHAPES[:3]:
        expect_budget_with(name, inputs(shape))


@pytest.mark.parametrize("name", ("fa4", "xformers"))
def test_what_cannot_be_traced_compiles_as_one_op(stand_in, name):
    torch.compiler.reset()
    stand_in(name)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    expect_budget_with(name, inputs((2, 2, 8, 72)), compiled)


def chosen(asked, dtype=F32):
    return select(asked, heads=2, tokens=64, head_dim=72, batch=4, dtype=dtype, device="cpu")


def test_fa4_sees_padded_head_dims_and_the_true_scale_and_is_no_fa2(stand_in):
    stand_in("fa4")
    assert BACKENDS["fa2"].probe() == "not installed"  # not a broken one
    assert BACKENDS["fa4"].multiple == 32  # its dq is wrong at 72 and 80 on Hopper
    selection = chosen("fa4")
    assert selection.backend == "fa4" and "asked for" in selection.reason
    (seen,) = sys.modules["flash_attn.cute.interface"].HEAD_DIMS
    assert seen == 96


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_gradients_are_refused_with_the_numbers(stand_in, dtype):
    stand_in("fa4").probe()
    sys.modules["flash_attn.cute.interface"].WRONG = 1.05
    numbers = r"'fa4' cannot run: error of dq is \d\.\d+e-\d+, expected at most \d\.\d+e-\d+"
    refused(lambda: chosen("fa4", dtype), numbers, error=RuntimeError)


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
        assert args[0].shape == (4, 2, 16, 8)
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
    assert left_out["math"] == "out of memory at (4, 2, 16, 8)" and "dq" in left_out["wrong"]
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
    refused(lambda: chosen("fa4", BF16), "'fa4' cannot run: it runs on cuda")
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
@pytest.mark.parametrize("dtype", (F32, BF16))
def test_auto_on_cuda_takes_the_fastest_row(dtype):
    shape = {"heads": 16, "tokens": 256, "head_dim": 72, "batch": 8}
    selection = select("auto", **shape, dtype=dtype, device="cuda")
    eligible = [row for row in selection.rows if not row.left_out]
    assert selection.backend == min(eligible, key=lambda row: row.ms).backend
    assert len(selection.rows) == len(BACKENDS) and "fastest" in selection.reason
