"""Kernel measurements: what is counted, who is refused a figure, and one run of the program."""

import math

import pytest
import torch

from benchmarks.harness.rows import append, read
from benchmarks.harness.timing import Effort, Timing
from benchmarks.kernels import report, run, tune
from benchmarks.kernels.measure import Bench
from benchmarks.kernels.ops import CASES, Problem, problems, short
from benchmarks.kernels.providers import EAGER, Provider, providers
from repa_fast import ops
from repa_fast.kernels.attention import BACKENDS

CPU = torch.device("cpu")
A = 32 * 256 * 1152  # elements of a stream of SiT-XL/2
V = 32 * 1152 * 2  # bytes of a vector per sample
P = 32 * 256 * 768
S = 64 * 4 * 32 * 32
Q = 32 * 16 * 256 * 72


@pytest.fixture(scope="module")
def bench():
    found = Bench(CPU, Effort(graph_ms=0.1, rounds=3, warmup=0))
    found.tidy = lambda: None  # collecting garbage takes longer than all else
    return found


def rows_of(bench, op, provider, *modes):
    (problem,) = problems(op, CPU)
    return list(bench.rows(problem, provider, modes or problem.case.modes))


def test_every_public_op_is_measured():
    others = {"select_attention", "set_attention_backend", "use_attention_backend", "why_not_cuda"}
    others |= {"adamw_ema", "sum_of_squares"}  # benchmarks/step/optim.py
    others |= {"attention_packed"}  # which measures attention
    others |= {"ATTENTION_BACKENDS", "standard_normal"}  # once per image, in plain torch
    assert set(CASES) == set(ops.__all__) - others


def test_the_list_names_every_op_and_every_provider_with_its_state(capsys):
    assert run.main(["--list"]) == 0
    listed = {}
    for line in capsys.readouterr().out.splitlines():
        if not line.startswith(" "):
            listed[line] = found = {}
        else:
            name, _, state = line.strip().partition(": ")
            found[name] = state
    assert {op: list(found) for op, found in listed.items()} == {
        op: [*providers(op)] for op in CASES
    }
    assert all(state for found in listed.values() for state in found.values())
    assert set(listed["attention"]) >= set(BACKENDS)
    assert {"ours", "compile", "eager", "liger", "quack", "cudnn", "apex"} == set(listed["adaln"])


# bytes per element of x, branch, out, y in an fp32 stream and a bf16 branch: 4, 2, 4, 2
@pytest.mark.parametrize(
    "op, forward, backward",
    [
        ("adaln", (4 + 2) * A + 2 * V, (2 + 4 + 4) * A + 3 * V),
        ("gate_residual", (4 + 2 + 4) * A + V, (4 + 2 + 2) * A + 2 * V),
        ("gate_residual_adaln", 12 * A + 3 * V, 18 * A + 5 * V),
        ("align_loss", 4 * P + 32 * 4, 6 * P + 32 * 4),
        ("attention", 8 * Q, 16 * Q),
        ("euler_maruyama_step", (4 + 2 + 2 + 4 + 2) * S + 64 * 8, None),
    ],
)
def test_necessary_bytes_and_flops(op, forward, backward):
    problem = Problem(CASES[op], CASES[op].shapes[0], CASES[op].dtypes[0])
    assert problem.necessary_bytes("forward") == forward
    if backward is not None:
        assert problem.necessary_bytes("backward") == backward
        assert problem.necessary_bytes("both") == forward + backward
    if op == "attention":  # those of its products
        assert problem.flops("forward") == 4 * 256 * Q
        assert problem.flops("backward") == 10 * 256 * Q


@pytest.mark.parametrize("op", CASES)
def test_inputs_are_what_the_case_says_and_depend_on_the_seed(op):
    (problem,) = problems(op, CPU)
    first, again, other = (problem.make_inputs(seed, CPU) for seed in (1, 1, 2))
    for name, spec in problem.case.inputs(problem.shape, problem.dtype).items():
        assert first[name].shape == spec.shape and first[name].dtype == spec.dtype
        assert torch.equal(first[name], again[name])
        assert name == "index" or not torch.equal(first[name], other[name])


@pytest.mark.parametrize("op", CASES)
def test_the_reference_passes_the_gate_and_gets_figures(bench, op):
    name = "reference" if op == "attention" else "eager"
    for row in rows_of(bench, op, providers(op)[name]):
        assert row["status"] == "ok", row
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms_p50"] / 1e6)
        assert row["share_of_copy"] > 0 and row["method"] == "perf_counter"
        assert math.isfinite(row["tflop_per_s"] or 0)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda y: 1.05 * y, "y: "),
        (lambda y: torch.cat([y[:-1], 1.05 * y[-1:]]), "y: "),
        (lambda y: y + math.nan, "y: "),
        (lambda y: y + 0.05 * (y - y.detach()), "dx: "),
        (lambda y: y.float(), "torch.float32"),
        (lambda y: y[:1], "Mismatch in shape"),
    ],
    ids=["value", "last sample", "nan", "gradient", "dtype", "shape"],
)
def test_a_wrong_provider_is_refused_and_gets_no_figure(bench, change, named):
    wrong = Provider("wrong", lambda case: lambda **tensors: change(case.reference(**tensors)))
    (row,) = rows_of(bench, "adaln", wrong)
    assert row["status"] == "failed" and named in row["message"]
    assert not any(name.startswith("ms_") for name in row)
    assert "host_us_p50" not in bench.overhead("adaln", wrong)


def test_what_cannot_be_built_or_run_says_why(bench):
    def build(case):
        raise RuntimeError("no such kernel\nmore")

    absent = Provider("absent", build, why_not=lambda device: "it is not installed")
    (row,) = rows_of(bench, "adaln", Provider("broken", build))
    assert (row["status"], row["message"]) == ("failed", "RuntimeError: no such kernel")
    (row,) = rows_of(bench, "adaln", absent)
    assert (row["status"], row["message"]) == ("unavailable", "it is not installed")


def once(y):
    """Return y with a graph that cannot be used twice."""
    used = []

    def hook(_):
        if used:
            raise RuntimeError("used twice")
        used.append(True)

    y.register_hook(hook)
    return y


@pytest.mark.parametrize("both", [7.0, 3.0])
def test_a_backward_pass_that_cannot_repeat_is_a_difference_unless_that_is_noise(
    bench, monkeypatch, both
):
    measured = bench._time

    def time(problem, call, mode):
        if mode == "backward":
            return measured(problem, call, mode)
        p50 = {"both": both, "forward": 3.0}[mode]
        return Timing(p50 - 0.5, p50, p50 + 0.5, 10, 3, "cuda graph"), None

    monkeypatch.setattr(bench, "_time", time)
    provider = Provider("once", lambda case: lambda **tensors: once(case.reference(**tensors)))
    (row,) = rows_of(bench, "adaln", provider, "backward")
    if both == 3:
        assert row["status"] == "failed" and "3.0 ms" in row["message"]
        return
    assert row["status"] == "ok", row
    assert row["method"] == "both - forward, cuda graph (RuntimeError: used twice)"
    assert (row["ms_p20"], row["ms_p50"], row["ms_p80"]) == (3.0, 4.0, 5.0)


def test_a_run_writes_rows_a_report_and_a_picture(tmp_path, capsys, coarse_pictures):
    arguments = ["--op", "align_loss", "--op", "adaln", "--provider", "eager", "--provider", "apex"]
    assert run.main([*arguments, "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "rows.jsonl")
    assert {row["mode"] for row in rows} == {"forward", "backward", "both", "overhead", "all"}
    for row in rows:
        assert {"op", "provider", "shape", "dtype", "commit", "command", "device"} <= row.keys()
        assert row["status"] in ("ok", "unavailable")
    text = (tmp_path / "report.md").read_text()
    assert "align_loss" in text and "apex is not installed" in text and "host time" in text
    assert (tmp_path / "shares.png").read_bytes().startswith(b"\x89PNG")
    assert "% of copy" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--limit", "0"], "time limit: adaln 4x64x384 fp32 ours left out"),
        (["--batch", "5"], "adaln: no shape of this batch size and dtype"),
    ],
)
def test_what_is_not_measured_is_said_and_has_no_rows(tmp_path, capsys, flags, said):
    arguments = ["--op", "adaln", "--device", "cpu", "--out", str(tmp_path)]
    assert run.main([*arguments, *flags]) == 0
    assert not (tmp_path / "rows.jsonl").read_text()
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, found",
    [
        ([], [(32, "fp32"), (32, "bf16"), (256, "fp32"), (256, "bf16")]),
        (["--batch", "32"], [(32, "fp32"), (32, "bf16")]),
        (["--batch", "32", "256", "--dtype", "bf16"], [(32, "bf16"), (256, "bf16")]),
        (["--batch", "31"], []),
    ],
)
def test_batch_sizes_and_dtypes_can_be_chosen(flags, found):
    arguments = run.parse(["--op", "adaln", *flags])
    chosen = run.chosen_problems("adaln", torch.device("cuda"), arguments)
    assert [(problem.shape[0], short(problem.dtype)) for problem in chosen] == found


def test_a_report_has_the_last_row_of_each_and_none_where_its_provider_was_wrong_since(
    tmp_path, bench
):
    path = tmp_path / "rows.jsonl"
    (right,) = rows_of(bench, "gate_residual", EAGER, "forward")
    compiled = {**right, "provider": "compile", "ms_p50": 2 * right["ms_p50"]}
    append(path, {**right, "ms_p50": 1e9}, right, compiled)
    latest = report.read(path)
    assert latest == [right, compiled]
    assert report.ratio_to_compile(right, latest) == "2.00"
    refused = {**right, "mode": "all", "status": "failed", "message": "gate: out"}
    append(path, refused)
    assert report.read(path) == [compiled, refused]
    assert "| gate: out | 4x64x384 fp32 all |" in report.markdown([refused])
    append(path, right)
    assert report.read(path) == [compiled, right]


def test_every_kernel_has_tiles_that_can_be_filled():
    pytest.importorskip("triton")
    for kernel in tune.KERNELS:
        found = tune.points(kernel)
        assert found and len(found) == len(set(found))
        for tile, chunks in found:
            assert (tile.rows is None) == (chunks is not None) == bool(tune.KERNELS[kernel][2])
            assert tile.rows is None or tile.stages <= tile.rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_tuning_says_so_in_one_line(capsys):
    assert tune.main([]) == 0
    assert capsys.readouterr().out == "tuning needs a GPU: no CUDA device\n"


@pytest.mark.gpu
@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("name", ["compile", "ours"])
def test_figures_on_a_gpu_come_from_graphs(op, name):
    bench = Bench(torch.device("cuda"), Effort(rounds=3, warmup=1))
    provider = providers(op)["sdpa" if (op, name) == ("attention", "ours") else name]
    problem = Problem(CASES[op], CASES[op].small, CASES[op].dtypes[0])
    for row in bench.rows(problem, provider, problem.case.modes):
        assert row["status"] == "ok" and row["method"] == "cuda graph", row
        assert 0 < row["ms_p50"] < 10 and row["peak_bytes"] > 0 and row["sets"] > 1
    host = bench.overhead(op, provider)
    assert host["status"] == "ok" and host["host_us_p50"] > 0
