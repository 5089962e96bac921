import importlib.util
import logging

import pytest
import torch

from repa_fast import ops
from repa_fast.backend import dispatch
from repa_fast.backend.dispatch import runs_triton, use_kernels
from repa_fast.diffusion.path import linear

TOKENS, VECTOR = torch.ones(2, 3, 8), torch.ones(2, 8)
CALLS = {
    "adaln": (TOKENS, VECTOR, VECTOR),
    "gate_residual": (TOKENS, TOKENS, VECTOR),
    "gate_residual_adaln": (TOKENS, TOKENS, VECTOR, VECTOR, VECTOR),
    "align_loss": (TOKENS, TOKENS),
    "euler_maruyama_step": (TOKENS, TOKENS, TOKENS, 0.5, -0.1),
}


def call(op, arguments=None, **options):
    if op == "euler_maruyama_step":
        options["path"] = linear
    return getattr(ops, op)(*(arguments or CALLS[op]), **options)


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """Nothing asked for, nothing said yet, and no interpreter."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    use_kernels(None)
    if importlib.util.find_spec("triton"):
        import triton

        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    forget()
    yield
    use_kernels(None)
    forget()


def forget():
    dispatch.why_not_triton.cache_clear()
    dispatch._say_once.cache_clear()


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels count as able to run on the CPU; they are not run."""
    knobs = pytest.importorskip("triton").knobs
    monkeypatch.setattr(knobs.runtime, "interpret", True)


@pytest.fixture
def needs_triton():
    pytest.importorskip("triton")


@pytest.fixture
def without_triton(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name)
    )


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == dispatch.__name__]


@pytest.mark.usefixtures("needs_triton")
@pytest.mark.parametrize("op", CALLS)
def test_auto_runs_the_reference_on_the_cpu_and_says_once_why(caplog, op):
    caplog.set_level(logging.INFO)
    expected = call(op, implementation="reference")
    assert not messages(caplog)
    for implementation in ("auto", None, "auto"):
        actual = call(op, implementation=implementation)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert messages(caplog) == [f"{op}: reference, since the tensors are on the CPU"]


@pytest.mark.usefixtures("interpreted")
def test_auto_takes_the_kernels_where_they_can_run_and_says_so_once(caplog):
    caplog.set_level(logging.INFO)
    assert all(runs_triton("some_op", "auto", TOKENS) for _ in range(2))
    assert messages(caplog) == ["some_op: Triton kernels"]


@pytest.mark.usefixtures("interpreted")
def test_auto_says_another_reason_when_there_is_another(caplog):
    caplog.set_level(logging.INFO)
    for tensor in (TOKENS, TOKENS.double(), TOKENS.double(), TOKENS):
        assert runs_triton("some_op", "auto", tensor) == (tensor.dtype == torch.float32)
    first, second = messages(caplog)
    assert first == "some_op: Triton kernels"
    assert second == "some_op: reference, since the kernels do not take torch.float64"


@pytest.mark.usefixtures("needs_triton")
@pytest.mark.parametrize("ask", ("call", "process", "environment"))
@pytest.mark.parametrize("op", CALLS)
def test_triton_on_the_cpu_raises_with_the_reason(monkeypatch, op, ask):
    options = {"implementation": "triton"} if ask == "call" else {}
    if ask == "process":
        use_kernels("triton")
    if ask == "environment":
        monkeypatch.setenv("REPA_FAST_KERNELS", "triton")
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{op}: .*'triton'.* the tensors are on the CPU"):
            call(op, **options)


@pytest.mark.usefixtures("needs_triton")
def test_triton_on_the_cpu_raises_when_compiled():
    compiled = torch.compile(ops.adaln, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="the tensors are on the CPU"):
        compiled(*CALLS["adaln"], implementation="triton")


@pytest.mark.usefixtures("without_triton")
@pytest.mark.parametrize("op", CALLS)
def test_without_triton_auto_runs_the_reference_and_triton_raises(caplog, op):
    caplog.set_level(logging.INFO)
    expected = call(op, implementation="reference")
    torch.testing.assert_close(call(op), expected, rtol=0, atol=0)
    assert messages(caplog) == [f"{op}: reference, since Triton is not installed"]
    with pytest.raises(ValueError, match=f"{op}: .*'triton'.*Triton is not installed"):
        call(op, implementation="triton")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("op", [op for op in CALLS if op != "euler_maruyama_step"])
def test_fp64_in_any_argument_is_refused_by_the_kernels(op):
    for which in range(len(CALLS[op])):
        arguments = list(CALLS[op])
        arguments[which] = arguments[which].double()
        with pytest.raises(ValueError, match=f"{op}: .*'triton'.* do not take torch.float64"):
            call(op, arguments, implementation="triton")
        call(op, arguments)


@pytest.mark.parametrize("implementation", ("auto", "triton", "reference"))
@pytest.mark.parametrize("op", CALLS)
def test_tensors_on_two_devices_are_refused(op, implementation):
    tensors = [i for i, v in enumerate(CALLS[op]) if isinstance(v, torch.Tensor)]
    for which in tensors:
        arguments = list(CALLS[op])
        arguments[which] = arguments[which].to("meta")
        with pytest.raises(ValueError, match=f"{op}: tensors on .*expected one device") as error:
            call(op, arguments, implementation=implementation)
        assert "cpu" in str(error.value) and "meta" in str(error.value)


@pytest.mark.parametrize("op", CALLS)
def test_meta_tensors_take_the_reference_and_are_refused_by_the_kernels(op):
    arguments = [v.to("meta") if isinstance(v, torch.Tensor) else v for v in CALLS[op]]
    result = call(op, arguments)
    result = result[0] if isinstance(result, tuple) else result
    assert result.is_meta
    with pytest.raises(ValueError, match=f"{op}: .*'triton', but "):
        call(op, arguments, implementation="triton")


@pytest.mark.usefixtures("needs_triton")
@pytest.mark.parametrize("device", ("mps", "xpu"))
def test_devices_without_kernels_have_a_reason(device):
    assert dispatch.why_not_triton(device)


@pytest.mark.parametrize("asked", dispatch.IMPLEMENTATIONS)
def test_the_environment_asks_where_nobody_else_does(monkeypatch, asked):
    assert dispatch.asked() == "auto"
    monkeypatch.setenv("REPA_FAST_KERNELS", asked)
    assert dispatch.asked() == asked


def test_an_empty_variable_asks_for_nothing(monkeypatch):
    monkeypatch.setenv("REPA_FAST_KERNELS", "")
    assert dispatch.asked() == "auto"


def test_an_unknown_name_in_the_environment_names_the_variable(monkeypatch):
    monkeypatch.setenv("REPA_FAST_KERNELS", "cuda")
    message = "REPA_FAST_KERNELS is 'cuda', expected one of auto, triton, reference"
    with pytest.raises(ValueError, match=message):
        call("adaln")
    with pytest.raises(ValueError, match=message):
        dispatch.asked()


@pytest.mark.parametrize("name", ("cuda", "", "Triton"))
def test_an_unknown_name_for_the_process_or_a_call_is_refused(name):
    use_kernels("reference")
    with pytest.raises(ValueError, match=f"kernels is '{name}', expected one of auto, triton, ref"):
        use_kernels(name)
    assert dispatch.asked() == "reference"
    with pytest.raises(ValueError, match=f"adaln: implementation is '{name}', expected one of"):
        call("adaln", implementation=name)


@pytest.mark.usefixtures("interpreted")
def test_the_call_comes_before_the_process_and_that_before_the_environment(monkeypatch):
    def takes_triton(implementation=None):
        return runs_triton("some_op", implementation, TOKENS)

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


@pytest.mark.parametrize("asked", ("auto", "reference"))
def test_describe_says_what_runs(monkeypatch, asked):
    use_kernels(asked)
    assert dispatch.describe("cpu").startswith("reference, ")


@pytest.mark.usefixtures("needs_triton")
def test_describe_raises_where_calls_would():
    use_kernels("triton")
    with pytest.raises(ValueError, match="'triton', but the tensors are on the CPU"):
        dispatch.describe("cpu")


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
def test_auto_takes_the_first_that_nothing_is_against(caplog, against, expected):
    caplog.set_level(logging.INFO)
    candidates = {
        name: (lambda name=name: f"{name} cannot") if name in against else dispatch.runs
        for name in "abc"
    }
    candidates["d"] = never
    assert all(dispatch.choose("what: how", "auto", candidates) == expected for _ in range(2))
    choice, reason = expected
    assert messages(caplog) == [f"what: {choice}" + (f", {reason}" if against else "")]


def test_what_is_asked_for_runs_or_raises():
    candidates = {"a": never, "b": dispatch.runs, "c": lambda: "there is none"}
    assert dispatch.choose("what", "b", candidates) == ("b", "asked for")
    with pytest.raises(ValueError, match="what is 'c', but there is none"):
        dispatch.choose("what", "c", candidates)
    with pytest.raises(ValueError, match="what is 'd', expected one of auto, a, b, c"):
        dispatch.choose("what", "d", candidates)


def test_auto_raises_where_nothing_can_run():
    candidates = {"a": lambda: "no a", "b": lambda: "no b"}
    with pytest.raises(ValueError, match="what is 'auto', but nothing can run: no a; no b"):
        dispatch.choose("what", "auto", candidates)
