"""Which implementation runs, who may ask for one, and what is said about it."""

import importlib.util
import logging
from functools import partial

import pytest
import torch

from repa_fast import ops
from repa_fast.backend import dispatch
from repa_fast.backend.dispatch import runs_triton, use_kernels
from tests.kernels.evaluate import evaluate
from tests.kernels.table import OPS
from tests.refusals import refused

ONE = torch.ones(2, 3, 8)
NEEDS_TRITON = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")


def call(op, arguments=None, **options):
    """The outputs of an op."""
    return evaluate(op, arguments or OPS[op].arguments(), None, options)[0]


def moved(op, *names):
    """Arguments of an op, those of these names on a device that is none."""
    arguments = OPS[op].arguments()
    return arguments | {name: arguments[name].to("meta") for name in names}


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """Nothing asked for, nothing said yet, and no interpreter."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    if importlib.util.find_spec("triton"):
        import triton

        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)

    def forget():
        use_kernels(None)
        dispatch.why_not_triton.cache_clear()
        dispatch._say_once.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels count as able to run on the CPU; they are not run."""
    knobs = pytest.importorskip("triton").knobs
    monkeypatch.setattr(knobs.runtime, "interpret", True)


@pytest.fixture
def without_triton(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name)
    )


@pytest.fixture
def said(caplog):
    """What dispatch has logged, as a function."""
    caplog.set_level(logging.INFO)
    return lambda: [r.getMessage() for r in caplog.records if r.name == dispatch.__name__]


@NEEDS_TRITON
@pytest.mark.parametrize("op", OPS)
def test_auto_runs_the_reference_on_the_cpu_and_says_once_why(said, op):
    expected = call(op, implementation="reference")
    assert not said()
    for implementation in ("auto", None, "auto"):
        actual = call(op, implementation=implementation)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert said() == [f"{op}: reference, since the tensors are on the CPU"]


@pytest.mark.usefixtures("interpreted")
def test_auto_takes_the_kernels_where_they_can_run_and_says_each_reason_once(said):
    for tensor in (ONE, ONE, ONE.double(), ONE.double(), ONE):
        assert runs_triton("some_op", "auto", tensor) == (tensor.dtype == torch.float32)
    assert said() == [
        "some_op: Triton kernels",
        "some_op: reference, since the kernels do not take torch.float64",
    ]


@NEEDS_TRITON
@pytest.mark.parametrize("ask", ("call", "process", "environment"))
@pytest.mark.parametrize("op", OPS)
def test_triton_on_the_cpu_raises_with_the_reason(monkeypatch, op, ask):
    options = {"implementation": "triton"} if ask == "call" else {}
    if ask == "process":
        use_kernels("triton")
    if ask == "environment":
        monkeypatch.setenv("REPA_FAST_KERNELS", "triton")
    for _ in range(2):
        refused(lambda: call(op, **options), f"{op}: .*'triton'.* the tensors are on the CPU")


@NEEDS_TRITON
def test_triton_on_the_cpu_raises_when_compiled():
    compiled = torch.compile(ops.adaln, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="the tensors are on the CPU"):
        compiled(**OPS["adaln"].arguments(), implementation="triton")


@pytest.mark.usefixtures("without_triton")
@pytest.mark.parametrize("op", OPS)
def test_without_triton_auto_runs_the_reference_and_triton_raises(said, op):
    expected = call(op, implementation="reference")
    torch.testing.assert_close(call(op), expected, rtol=0, atol=0)
    assert said() == [f"{op}: reference, since Triton is not installed"]
    words = f"{op}: .*'triton'.*Triton is not installed"
    refused(lambda: call(op, implementation="triton"), words)


@pytest.mark.parametrize("implementation", ("auto", "triton", "reference"))
@pytest.mark.parametrize("op", OPS)
def test_tensors_on_two_devices_are_refused(op, implementation):
    for name in OPS[op].tokens + OPS[op].vectors:
        refused(
            lambda name=name: call(op, moved(op, name), implementation=implementation),
            f"{op}: tensors on .*expected one device",
            "cpu",
            "meta",
        )


@pytest.mark.parametrize("op", OPS)
def test_meta_tensors_take_the_reference_and_are_refused_by_the_kernels(op):
    arguments = moved(op, *OPS[op].tokens, *OPS[op].vectors)
    assert call(op, arguments)[0].is_meta
    refused(lambda: call(op, arguments, implementation="triton"), f"{op}: .*'triton', but ")


@NEEDS_TRITON
def test_devices_without_kernels_have_a_reason():
    assert all(map(dispatch.why_not_triton, ("mps", "xpu")))


def test_the_environment_asks_where_nobody_else_does_and_is_named_for_an_unknown_name(monkeypatch):
    assert dispatch.asked() == "auto"
    for asked in (*dispatch.IMPLEMENTATIONS, ""):
        monkeypatch.setenv("REPA_FAST_KERNELS", asked)
        assert dispatch.asked() == (asked or "auto")
    monkeypatch.setenv("REPA_FAST_KERNELS", "cuda")
    for ask in (dispatch.asked, lambda: call("adaln")):
        refused(ask, "REPA_FAST_KERNELS is 'cuda', expected one of auto, triton, reference")


@pytest.mark.parametrize("name", ("cuda", "", "Triton"))
def test_an_unknown_name_for_the_process_or_a_call_is_refused(name):
    use_kernels("reference")
    words = f"kernels is '{name}', expected one of auto, triton, ref"
    refused(lambda: use_kernels(name), words)
    assert dispatch.asked() == "reference"
    words = f"adaln: implementation is '{name}', expected one of"
    refused(lambda: call("adaln", implementation=name), words)


@pytest.mark.usefixtures("interpreted")
def test_the_call_comes_before_the_process_and_that_before_the_environment(monkeypatch):
    def takes_triton(implementation=None):
        return runs_triton("some_op", implementation, ONE)

    monkeypatch.setenv("REPA_FAST_KERNELS", "reference")
    assert not takes_triton() and takes_triton("triton") and takes_triton("auto")
    use_kernels("triton")
    assert takes_triton() and not takes_triton("reference")
    use_kernels("auto")
    assert takes_triton()
    use_kernels("reference")
    monkeypatch.setenv("REPA_FAST_KERNELS", "triton")
    assert not takes_triton() and takes_triton("triton")
    use_kernels(None)
    assert takes_triton()
    monkeypatch.delenv("REPA_FAST_KERNELS")
    assert takes_triton()


def test_describe_says_what_runs_or_raises_where_calls_would():
    for asked in ("auto", "reference"):
        use_kernels(asked)
        assert dispatch.describe("cpu").startswith("reference, ")
    use_kernels("triton")
    words = "'triton', but (the tensors are on the CPU|Triton is not installed)"
    refused(lambda: dispatch.describe("cpu"), words)


def never():
    raise AssertionError("asked about a candidate that is not considered")


@pytest.mark.parametrize(
    "against, expected",
    (
        ((), ("a", "by default")),
        (("a",), ("b", "since a cannot")),
        (("a", "b"), ("c", "since a cannot; b cannot")),
    ),
)
def test_auto_takes_the_first_that_nothing_is_against(said, against, expected):
    candidates = {
        name: (lambda name=name: f"{name} cannot") if name in against else dispatch.runs
        for name in "abc"
    }
    candidates["d"] = never
    assert all(dispatch.choose("what: how", "auto", candidates) == expected for _ in range(2))
    choice, reason = expected
    assert said() == [f"what: {choice}" + (f", {reason}" if against else "")]


def test_what_is_asked_for_runs_or_raises():
    candidates = {"a": never, "b": dispatch.runs, "c": lambda: "there is none"}
    assert dispatch.choose("what", "b", candidates) == ("b", "asked for")
    nothing = {"a": lambda: "no a", "b": lambda: "no b"}
    for asked, among, words in (
        ("c", candidates, "what is 'c', but there is none"),
        ("d", candidates, "what is 'd', expected one of auto, a, b, c"),
        ("auto", nothing, "what is 'auto', but nothing can run: no a; no b"),
    ):
        refused(partial(dispatch.choose, "what", asked, among), words)
