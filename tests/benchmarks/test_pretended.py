"""The pretended card: what it reports of mistakes that are planted here."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.pretended import __main__ as program
from benchmarks.gpu.pretended import build
from benchmarks.gpu.pretended import report as pretended_report
from benchmarks.harness.environment import ROOT
from benchmarks.harness.rows import append, read
from tests.refusals import refused

HERE = Path(__file__).parent
REASON = build.why_not()
needs_card = pytest.mark.skipif(REASON is not None, reason=str(REASON))
NO_CSRC = REASON or (None if shutil.which("nvcc") else "csrc cannot be built: there is no nvcc")
needs_csrc = pytest.mark.skipif(NO_CSRC is not None, reason=str(NO_CSRC))
GPU_PYTHON = ROOT / ".venv-gpu" / "bin" / "python"
LIBRARY, RELEASED = Path("repa_fast/lib/csrc.so"), ("loss.py", "models/sit.py")

FACTS = """
import ctypes, json, sys
import pytest
import torch
import triton
import triton.language as tl

@triton.jit
def add_one(p, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(p + i, tl.load(p + i) + 1)

def error_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""

def captured(work):
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        work()

def astray():
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x + 1

card = ctypes.CDLL(None)
card.pretended_launches.restype = ctypes.c_long
x = torch.ones(256, device="cuda")
found = {"name": torch.cuda.get_device_name(), "gib": torch.cuda.mem_get_info()[1] / 2**30}
before = card.pretended_launches()
y = (x * 2).to(torch.bfloat16)
z = torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")
found["launches"] = card.pretended_launches() - before
found["memory"] = error_of(lambda: torch.empty(80 * 2**30, dtype=torch.uint8, device="cuda"))
found["right"] = error_of(lambda: add_one[(2,)](x, B=128))
found["cpu tensor"] = error_of(lambda: add_one[(2,)](torch.ones(256), B=128))
found["grid"] = error_of(lambda: add_one[(1, 70000)](x, B=128))
found["dtype"] = error_of(lambda: torch.ones(64, 64, device="cuda") @ z.to(torch.bfloat16))
found["graph"] = error_of(lambda: captured(lambda: x.add_(1)))
found["item in a graph"] = error_of(lambda: captured(lambda: x.sum().item()))
found["lost stream"] = error_of(lambda: captured(astray))
torch.cuda.set_sync_debug_mode("warn")
loss = x.sum()
loss.item()
torch.cuda.set_sync_debug_mode("default")
print(json.dumps(found))
flags = ["-p", "benchmarks.gpu.pretended.plugin", "-p", "no:cacheprovider"]
sys.exit(pytest.main([*flags, *sys.argv[1:]]))
"""

COLLECTED = """
import pytest
import torch

def most_of_the_card():
    return torch.empty(45 * 2**30, dtype=torch.uint8, device="cuda")

@pytest.mark.gpu
def test_number():
    held = most_of_the_card()
    assert torch.ones(8192, device="cuda").sum().item() == 8192

@pytest.mark.gpu
def test_no_number():
    held = most_of_the_card()
    torch.testing.assert_close(torch.ones(0, device="cuda"), torch.ones(0, device="cuda"))

@pytest.mark.gpu
def test_launch():
    torch.ones(2, 3, device="cuda") @ torch.ones(2, 3, device="cuda")

@pytest.mark.gpu
def test_right():
    assert torch.ones(2, device="cuda").is_cuda
"""
"""Wrong numbers, which are no failures and keep no memory, a wrong launch, which is one, and what
passes."""


def run(*arguments, seconds=60, **values):
    """The finished command on the pretended card."""
    command = [sys.executable, "-m", "benchmarks.gpu.pretended", *map(str, arguments)]
    environment = {**os.environ, **{name: str(value) for name, value in values.items()}}
    environment.pop("PYTEST_XDIST_WORKER", None)  # a pytest in there is nobody's worker
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
    )


SHORT = ("-c", ROOT / "pyproject.toml", "--full", "-m", "gpu", HERE / "test_run.py")
SHORT += ("-k", "test_planted or ours-gate_residual]")
"""A test of this suite, and those that are planted."""


def assert_rehearsed(report, done):
    (row,) = read(report)
    assert (row["passed"], row["numbers"]) == (2, 2), done.stdout
    (failed,) = row["failed"]
    assert failed.endswith("test_launch") and done.returncode == 1


@needs_card
def test_facts_planted_mistakes_a_wait_with_its_line_and_a_short_rehearsal(tmp_path):
    """In one process, whose start takes most of the time."""
    (tmp_path / "planted.py").write_text(FACTS)
    (tmp_path / "test_planted.py").write_text(COLLECTED)
    report = tmp_path / "report.jsonl"
    done = run("--report", report, "-m", "planted", *SHORT, tmp_path, PYTHONPATH=tmp_path)
    assert done.stdout.startswith("{"), done.stderr
    found = json.loads(done.stdout.splitlines()[0])
    assert found["name"].endswith("pretended")
    assert found["gib"] == pytest.approx(79.1, abs=0.05)
    assert found["launches"] == 5  # multiply, cast, two fills, product
    assert found["memory"].startswith("OutOfMemoryError")
    assert found["right"] == found["graph"] == ""
    assert "cpu tensor?" in found["cpu tensor"]
    assert "invalid argument" in found["grid"]
    assert "same dtype" in found["dtype"]
    assert "capture" in found["item in a graph"]
    assert "unjoined" in found["lost stream"].lower()
    line = FACTS.splitlines().index("loss.item()") + 1
    assert f" at {tmp_path / 'planted.py'}:{line}\n" in done.stderr
    assert_rehearsed(report, done)


@needs_card
@pytest.mark.usefixtures("heavy")
def test_a_short_rehearsal_in_a_worker_which_reports_nothing(tmp_path):
    (tmp_path / "test_planted.py").write_text(COLLECTED)
    report = tmp_path / "report.jsonl"
    flags = ("-p", "no:cacheprovider", "-n", 1, *SHORT, tmp_path)
    assert_rehearsed(report, run("--report", report, "-m", "pytest", *flags, seconds=240))


@needs_card
@pytest.mark.usefixtures("heavy")
def test_all_gpu_tests_are_collected():
    flags = ("--collect-only", "-q", "--full", "-m", "gpu", "-p", "no:cacheprovider")
    done = run("-m", "pytest", *flags, "tests", seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "error" not in done.stdout.splitlines()[-1]
    assert done.stdout.count("::") > 300


@needs_csrc
@pytest.mark.usefixtures("heavy")
def test_a_step_is_rehearsed_and_so_is_its_graph(tmp_path):
    report, results = tmp_path / "report.jsonl", tmp_path / "results"
    flags = ("--report", report, "-m", "benchmarks.step.ladder", "--preset", "sit-s2-repa")
    flags += ("--batch", 4, "--rung", "one-pass", "graph", "--steps", 2, "--warmup", 1)
    done = run(*flags, seconds=500, REPA_FAST_RESULTS=results)
    assert done.returncode == 0, done.stdout + done.stderr
    (rows,) = results.glob("*/*/rows.jsonl")
    for measured in read(rows):
        assert "pretended" in measured["device"]
        assert measured["command"].startswith("python -m benchmarks.step.ladder --preset")
    plain, graphed = rows = pretended_report.read(report)
    assert pretended_report.verdicts(rows) == []
    for row, rung, warm_steps in ((plain, "one-pass", 2), (graphed, "graph", 4)):
        assert (row["rung"], row["batch"], row["micro_batch"]) == (rung, 4, 4)
        assert row["warm_steps"] == warm_steps
        assert row["synchronisations"] == 0, row["places"]
        assert row["recompilations"] == {}
        assert 1 <= row["block_graphs"] <= 3
        assert row["card_gib"] < row["card_of_gib"]
        assert len(row["functions"]) == 5
    assert plain["launches"] > 500 > graphed["launches"]
    assert graphed["graph_launches"] == 1 and graphed["replayed"] > 500


HEAD = {"kind": "step", "rung": "graph", "preset": "sit-xl2-repa", "batch": 256, "micro_batch": 128}
FAILED = HEAD | {"error": "OutOfMemoryError: CUDA out of memory"}
STEP = HEAD | {
    "warm_steps": 4, "synchronisations": 1 / 3,
    "places": {"repa_fast/train/metrics.py:73 <- " * 4: 3},
    "graphs": {"sit.py:forward": 3, "dinov2.py:forward": 1}, "block_graphs": 3,
    "recompilations": {"sit.py:forward": 1}, "graph_breaks": 0, "launches": 18.0,
    "graph_launches": 1.0, "replayed": 2975.0, "strays": 2, "host_ms": 1.5, "wall_ms": 1.25,
    "functions": [["torch/nn/modules/module.py:1 forward", 12.5, 1000.0]], "allocated_gib": 70.0,
    "reserved_gib": 75.0, "card_gib": 78.0, "card_of_gib": 79.1,
}  # fmt: skip


def test_the_table_is_for_people(tmp_path):
    failed = FAILED | {"card_gib": 79, "card_of_gib": 79.1}
    tests = {"kind": "tests", "passed": 3, "numbers": 2, "skipped": 1, "failed": {"a::b": "why"}}
    append(tmp_path / "report.jsonl", STEP, failed, tests)
    text = pretended_report.table(tmp_path / "report.jsonl")
    assert all(len(line) <= 100 for line in text.splitlines())
    for part in ("2975", "OutOfMemoryError", "metrics.py:73", "2 wrong in numbers alone"):
        assert part in text
    assert "compiled late: 1 x sit.py:forward" in text and "a::b: why" in text


def test_verdicts_are_about_the_last_row_of_each_step():
    verdicts = pretended_report.verdicts
    right = STEP | {"synchronisations": 0.0, "recompilations": {}}
    assert verdicts([STEP, right]) == []
    assert verdicts([STEP | {"rung": rung} for rung in ("", "recipe", "features")]) == []
    assert verdicts([right | {"rung": "one-pass", "graph_launches": 0.0}, {"kind": "tests"}]) == []
    wrong = {"block_graphs": 4, "card_gib": 79.5, "graph_launches": 0.0}
    assert verdicts([STEP | wrong]) == [
        f"graph, sit-xl2-repa, 256: {text}"
        for text in (
            "waits for the device 0.333333 times a step",
            "compiles after step 4: 1 x sit.py:forward",
            "4 graphs of blocks, expected at most 3",
            "79.5 GiB, expected at most 79.1",
            "no CUDA graph is replayed",
        )
    ]
    assert verdicts([right, FAILED]) == ["graph, sit-xl2-repa, 256: " + FAILED["error"]]


def not_a_gpu_machine():
    """Why .venv-gpu is not what a GPU machine has, or None."""
    if not GPU_PYTHON.exists():
        return "there is no .venv-gpu; `make .venv-gpu PYTHON=python3.12` makes it"
    if not (ROOT / LIBRARY).exists():
        return "csrc is not built; `make csrc-gpu` builds it"
    text = "import sys, torch, triton; print(*sys.version_info[:2], torch.__version__, sep='.')"
    found = subprocess.run([GPU_PYTHON, "-c", text], capture_output=True, text=True).stdout.strip()
    return None if found == "3.12.2.11.0+cu130" else f".venv-gpu has {found or 'no torch'}"


def copied(target):
    """A copy of the tracked files, csrc's library and the two files of the released code."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    released = Path(os.environ.get("REPA_OFFICIAL") or ROOT / ".released")
    names = [*filter(None, listed.stdout.split("\0")), str(LIBRARY)]
    pairs = [(ROOT / name, target / name) for name in names]
    pairs += [(released / name, target / ".released" / name) for name in RELEASED]
    for source, copy in pairs:
        if source.exists():  # the released code may be absent, and a tracked file deleted
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)


@needs_csrc
@pytest.mark.usefixtures("heavy")
def test_the_tree_and_the_library_are_all_that_a_gpu_machine_needs(tmp_path):
    if reason := not_a_gpu_machine():
        pytest.skip(reason)
    copied(tmp_path / "copy")
    flags = ["--pretended", "--seconds", "900", "--only", "card", "step", "--out", tmp_path / "out"]
    environment = {name: value for name, value in os.environ.items() if "CACHE_DIR" not in name}
    environment["REPA_OFFICIAL"] = str(tmp_path / "copy" / ".released")
    command = [GPU_PYTHON, "-m", "benchmarks.gpu", *flags]
    options = {"cwd": tmp_path / "copy", "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "card             ok" in done.stdout and "step             ok" in done.stdout


def test_flags_before_the_module_are_ours():
    words = ["--report", "r", "-m", "benchmarks.step.ladder", "--report", "theirs", "-m", "x"]
    flags, module, arguments = program.parse(words)
    assert (flags, module) == ({"--report": "r"}, "benchmarks.step.ladder")
    assert arguments == words[4:]
    with pytest.raises(SystemExit, match="usage"):
        program.parse(["benchmarks.step.ladder"])


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert "gcc" in build.why_not() or "Linux" in build.why_not()
    refused(build.build, "pretended card", error=RuntimeError)
