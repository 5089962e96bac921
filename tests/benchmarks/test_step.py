"""One run of a step and one of the ladder on tiny digits, and what reports make of rows."""

import gc
import json
import sys
from types import SimpleNamespace

import pytest

from benchmarks.harness import rows as files
from benchmarks.harness import timing
from benchmarks.step import baseline, ladder, parity, step
from benchmarks.step import report as step_report
from benchmarks.step.profile import CATEGORIES, WINDOW
from repa_fast import cli
from repa_fast.models.sit import SiT
from tests.refusals import refused


@pytest.fixture
def options(tmp_path, tiny_digits, monkeypatch):
    """options(*flags) -> flags of two steps of 2 digits on a CPU, with `out` below tmp_path."""
    monkeypatch.setitem(timing.MATMUL_SIDE, "cpu", 64)
    flags = ["--preset", "digits", "--device", "cpu", "--batch", "2", "--steps", "2"]
    return lambda *more: [*flags, "--warmup", "1", "--out", str(tmp_path / "out"), *more]


@pytest.fixture
def report(tmp_path, coarse_pictures):
    """report() -> the rows and the text of what was written."""
    out = tmp_path / "out"
    return lambda: (step_report.read(out / "rows.jsonl"), (out / "report.md").read_text())


def assert_report(text, row):
    for part in ("images/s", "MFU", "TFLOP/s", "peak GiB", "host ms", "launches", *CATEGORIES):
        assert part in text, part
    for part in (row["commit"], row["device"], row["torch"], f"`{row['command']}`"):
        assert part in text, part


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_a_run_writes_a_row_a_report_a_picture_and_a_trace(options, report, tmp_path, capsys):
    trace = tmp_path / "trace.json"
    assert step.main(options("--trace", str(trace))) == 0
    (row,), text = report()
    assert {"commit", "command", "device", "torch", "date"} <= row.keys()
    assert row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
    assert row["images_per_second"] == pytest.approx(2e3 / row["ms_p50"])
    parts = row["ms_by_category"]
    assert tuple(parts) == CATEGORIES
    assert sum(parts.values()) == pytest.approx(row["profiled_ms"])
    for name in ("GEMM", "attention", "other elementwise", "optimizer", "encoder", "idle"):
        assert 0 < parts[name] < row["profiled_ms"], name
    assert row["peak_memory_gib"] > 0.1 and row["host_ms"] == row["ms_p50"]
    assert 0 < row["first_step_seconds"] < 60
    assert_report(text, row)
    assert row["command"] in capsys.readouterr().out
    assert is_png(tmp_path / "out" / "shares.png")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {WINDOW, "encoder", "optimizer"} <= names


RELEASED = """
import torch
from benchmarks.step import baseline

class SiT(baseline.PlainSiT):
    def __init__(self, decoder_hidden_size, class_dropout_prob, use_cfg, fused_attn, qk_norm, **kw):
        super().__init__(kw)
        self.num_classes = kw["num_classes"]

    def forward(self, x, t, y):
        return super().forward(x, t, y, torch.zeros_like(y, dtype=torch.bool))
"""
LOSS = """
class SILoss:
    def __call__(self, model, images, model_kwargs, zs):
        t = images.new_full((len(images),), 0.5)
        prediction, projections = model(images, t, **model_kwargs)
        return prediction.square().flatten(1).mean(1), sum(p.mean() for p in projections)
"""


def test_the_ladder_has_what_is_asked_for(options, report, tmp_path, monkeypatch, capsys):
    """The released code is one of them where its folder is named."""
    monkeypatch.setattr(step_report, "draw", lambda rows, path: None)  # after every one
    monkeypatch.setattr(step, "matmul_rate", lambda dtype, device: 1e12)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sit.py").write_text(RELEASED)
    (tmp_path / "loss.py").write_text(LOSS)
    rungs = ["recipe", "tuned", "kernels", "one-pass", "features", "released"]
    flags = options("--steps", "1", "--warmup", "0", "--eager", "--official", str(tmp_path))
    assert ladder.main([*flags, "--rung", *rungs]) == 0, capsys.readouterr().out
    rows, text = report()
    released = rows.pop(1)  # as near to the recipe as tuned is
    assert [row["rung"] for row in (*rows, released)] == rungs
    assert released["status"] == "ok" and released["bases"] == ["recipe"]
    first, *others = rows
    assert first["precision"] == "float32" and {r["precision"] for r in others} == {"bfloat16"}
    for row in others[:-1]:
        assert row["loss"] == pytest.approx(first["loss"], rel=ladder.LOSS_TOLERANCE)
        assert row["ms_by_category"]["encoder"] > 0
    assert others[-1]["ms_by_category"]["encoder"] == 0
    assert others[-1]["gflop_per_image"] < first["gflop_per_image"]
    assert_report(text, first)
    for before, row in zip(rows, others):
        ratios = first["ms_p50"] / row["ms_p50"], before["ms_p50"] / row["ms_p50"]
        cells = f"{row['ms_p50']:.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} |"
        assert f"| {row['rung']} | {row['what']} | {cells}" in text
    assert "- kernels: kernels: reference, since" in text
    assert "(not compiled)" in others[1]["what"] and "(not compiled)" not in others[0]["what"]
    assert "floor" not in text


def test_the_middle_of_several_rounds_counts():
    times = (3.0, 1.0, 2.0)
    rounds = [{"status": "ok", "ms_p50": ms} for ms in times]
    assert ladder.middle(rounds[:1]) == rounds[0]
    assert ladder.middle(rounds) == {"status": "ok", "ms_p50": 2.0, "ms_of_rounds": [*times]}
    failed = {"status": "failed"}
    assert ladder.middle([failed, rounds[1]])["ms_of_rounds"] == [None, 1.0]
    assert ladder.middle([rounds[0], failed])["ms_p50"] == 3.0
    assert ladder.middle([failed, failed]) == failed


def test_what_was_measured_before_the_limit_is_kept(monkeypatch, tmp_path):
    now = [0.0]

    def measure(*_):
        now[0] += 10
        return {"ms_p50": now[0], "images_per_second": 1.0}

    monkeypatch.setattr(ladder, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(ladder, "measure", measure)
    monkeypatch.setattr(step, "append", lambda folder, row: None)
    limits = {"rounds": 3, "limit": 25, "rung": ["tuned", "kernels"]}
    rows = ladder.climb(SimpleNamespace(**limits, eager=True, device="cpu"), tmp_path)
    assert [(row["rung"], row["ms_p50"]) for row in rows] == [("tuned", 30.0), ("kernels", 20.0)]


@pytest.mark.parametrize("module, flag", ((ladder, "--rounds"), (parity, "--batch")))
def test_a_number_of_none_is_refused(module, flag, capsys):
    with pytest.raises(SystemExit):
        module.main([flag, "0"])
    assert f"{flag}: '0', expected a whole number from 1 on" in capsys.readouterr().err


def test_the_released_code_has_to_be_in_the_folder(make_state, tmp_path):
    words = f"{tmp_path} has no loss.py, expected a folder"
    refused(lambda: baseline.Official(make_state(), tmp_path), words)


def test_every_configuration_changes_one_that_there_is():
    way = ["graph", "one-pass", "kernels", "compiled", "tuned", "recipe"]
    assert ladder.bases(ladder.RUNGS["bf16-residual"]) == way
    assert [name for name, rung in ladder.RUNGS.items() if not ladder.bases(rung)] == ["recipe"]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--limit", "-1"], "time limit: recipe left out"),
        (["--rung", "released"], "released left out: --official names no folder"),
    ],
)
def test_what_begins_after_the_limit_or_has_no_folder_is_left_out(
    options, monkeypatch, capsys, flags, said
):
    monkeypatch.delenv("REPA_OFFICIAL", raising=False)
    assert ladder.main(options(*flags)) == 0
    assert said in capsys.readouterr().out


def test_while_the_rival_is_timed_the_projects_model_is_gone(options, monkeypatch):
    def models():
        gc.collect()
        return sum(type(one) is SiT for one in gc.get_objects())

    def figures(stepper, *_):
        seen[type(stepper).__name__] = models()
        raise RuntimeError("enough")

    seen, old = {}, models()
    monkeypatch.setattr(step, "figures", figures)
    assert ladder.main(options("--eager", "--rung", "tuned", "kernels")) == 1
    assert seen == {"Baseline": old, "Ours": old + 2}  # the model and its average


def test_a_wrong_loss_or_an_impossible_configuration_gets_no_figure_and_the_next_one_runs(
    options, report, tmp_path, monkeypatch
):
    monkeypatch.setattr(ladder, "expected_loss", lambda state, size: 123.0)
    monkeypatch.setattr(step, "figures", lambda *arguments: pytest.fail("was measured"))
    assert ladder.main(options("--eager", "--rung", "recipe", "kernels")) == 1
    rows, text = report()
    assert [row["rung"] for row in rows] == ["recipe", "kernels"]
    for row in rows:
        assert row["status"] == "failed" and "where plain fp32 has 123" in row["message"]
    assert "- recipe has no figure: RuntimeError: loss" in text
    assert not (tmp_path / "out" / "shares.png").exists()


def test_utilisation_is_of_the_peak_and_of_the_product_measured():
    """767 images/s of 770.5 GFLOP are 591 TFLOP/s: 59.8 % of 989 and 74.8 % of 790."""
    found = step.utilisation(767 * 770.5e9, 989e12, 790e12)
    assert found["mfu"] == pytest.approx(0.5976, abs=1e-4)
    assert found["mfu_of_matmul"] == pytest.approx(0.7481, abs=1e-4)
    assert found["matmul_tflop_per_s"] == 790
    assert step.utilisation(1e12, None, 1e12)["mfu"] is None


def test_bench_is_a_command_in_a_checkout(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(step, "main", seen.append)
    assert cli.main(["bench", "--preset", "digits"]) == 0
    assert seen == [["--preset", "digits"]]
    for name in ("benchmarks.step", "benchmarks.step.step"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "benchmarks", None)  # imports of it fail
    assert cli.main(["bench"]) == 2
    assert "expected `python -m repa_fast bench` in a checkout" in capsys.readouterr().err


def row_of(**changes):
    ones = "ms_p20 ms_p80 images_per_second gflop_per_image first_step_seconds mfu_of_matmul"
    row = dict.fromkeys(f"{ones} matmul_tflop_per_s peak_memory_gib".split(), 1.0)
    row |= {"preset": "sit-xl2-repa", "batch": 32, "micro_batch": 32, "rung": "recipe", "what": "x"}
    row |= {"status": "ok", "ms_p50": 90.0, "mfu": 0.1, "launches": 9876.0, "stall_ms": 0.0}
    row |= {"host_ms": 80.0, "profiled_ms": 95.0, "steps": 50, "warmup": 10, "compile": False}
    row |= {"precision": "float16", "data": "made up", "command": "c", "notes": [], "bases": []}
    row["ms_by_category"] = dict.fromkeys(CATEGORIES, 10.0)
    return {**row, **dict.fromkeys(files.STAMP, "?"), **changes}


@pytest.mark.parametrize(
    "changes, shown",
    [({}, True), ({"batch": 256}, False), ({"launches": None}, False), ({"rung": "tuned"}, False)],
)
def test_the_recipe_has_its_floor_on_a_gpu_at_the_shape_it_was_counted_for(changes, shown):
    text = step_report.markdown([row_of(**changes)])
    assert ("9,876 launches, 90.0 ms" in text and "71.3 ms" in text) == shown


def test_a_report_has_the_last_row_of_each_configuration_the_least_changed_first(report, tmp_path):
    """And of each way to run a single step."""
    failed = {"rung": "compiled", "what": "x", "bases": ["tuned", "recipe"], "status": "failed"}
    failed |= {"message": "boom", "command": "c"}
    failed |= {"preset": "sit-xl2-repa", "batch": 32, **dict.fromkeys(files.STAMP, "?")}
    wrong = {**failed, "rung": "kernels", "bases": ["compiled", "tuned", "recipe"]}
    large = row_of(batch=256, rung="one-pass")
    eager, compiled = row_of(rung=""), row_of(rung="", compile=True, ms_p50=1.0)
    text = step_report.markdown([eager, compiled])
    assert "| eager |" in text and "| compiled |" in text and "times the recipe" not in text
    early = [row_of(rung="kernels", bases=wrong["bases"]), row_of(ms_p50=1.0)]
    rows = [large, *early, {**failed, "rung": "recipe", "bases": []}, wrong, failed]
    files.append(tmp_path / "out" / "rows.jsonl", *rows, row_of(), eager, compiled, eager)
    step_report.write(tmp_path / "out")
    found, text = report()
    assert found == [eager, compiled, row_of(), failed, wrong, large]
    assert is_png(tmp_path / "out" / "shares.png")
    assert "- compiled has no figure: boom" in text and "- kernels has no figure: boom" in text
