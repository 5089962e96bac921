import argparse
import gc
import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks.harness.environment import ROOT
from benchmarks.harness.rows import STAMP
from benchmarks.paper import scaling
from benchmarks.step import ladder, step
from benchmarks.step import profile as step_profile
from benchmarks.step import report as step_report
from benchmarks.step.profile import CATEGORIES, WINDOW, Breakdown, breakdown
from repa_fast import cli
from repa_fast.backend import dispatch
from repa_fast.models.sit import SiT

OTHER = "other elementwise"
DIGITS = ["--preset", "digits", "--device", "cpu", "--batch", "2", "--steps", "2", "--warmup", "1"]


@pytest.fixture(autouse=True)
def same_process():
    yield
    dispatch.use_kernels(None)


def event(cat, name, ts, dur, tid=1, correlation=None):
    arguments = {} if correlation is None else {"args": {"correlation": correlation}}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, **arguments}


WHOLE = event("user_annotation", WINDOW, 0, 1000)


def test_kernels_are_those_of_the_range_that_launched_them_else_of_their_names():
    """Of two steps in 1000 us."""
    events = [
        WHOLE,
        event("user_annotation", "encoder", 0, 100),
        event("user_annotation", "Optimizer.step#AdamWEMA.step", 300, 100),
        # the same moment on autograd's thread is not the optimizer's
        event("cuda_runtime", "cudaLaunchKernel", 310, 5, tid=2, correlation=3),
        event("cuda_runtime", "cudaLaunchKernel", 10, 5, correlation=1),
        event("cuda_runtime", "cudaLaunchKernel", 320, 5, correlation=2),
        event("cuda_driver", "cuLaunchKernelEx", 200, 5, correlation=4),
        event("cuda_runtime", "cudaMemcpyAsync", 210, 5, correlation=5),
        event("cuda_runtime", "cudaStreamSynchronize", 990, 5, correlation=6),
        event("kernel", "nvjet_tst_128x256", 20, 100, tid=7, correlation=1),
        event("kernel", "multi_tensor_apply_kernel", 400, 200, tid=7, correlation=2),
        event("kernel", "nvjet_tst_128x256", 600, 50, tid=7, correlation=3),
        event("kernel", "adaln_backward_kernel", 650, 30, tid=7, correlation=4),
        event("gpu_memcpy", "Memcpy DtoD", 680, 20, tid=7, correlation=5),
        event("kernel", "before the window", -50, 20, tid=7, correlation=9),
    ]
    found = breakdown(events, 2, cuda=True)
    busy = {name: ms for name, ms in found.busy_ms.items() if ms}
    assert busy == pytest.approx(
        {
            "encoder": 0.05,
            "optimizer": 0.1,
            "GEMM": 0.025,
            "our kernels": 0.015,
            "other elementwise": 0.01,
        }
    )
    assert (found.window_ms, found.launches) == (0.5, 2.5)
    parts = found.milliseconds(0.5)
    assert tuple(parts) == CATEGORIES
    assert parts["idle"] == pytest.approx(0.3)
    assert sum(parts.values()) == pytest.approx(0.5)


def test_a_graph_is_one_launch_and_what_overlaps_counts_once():
    events = [
        WHOLE,
        event("cuda_runtime", "cudaGraphLaunch", 0, 5, correlation=1),
        event("kernel", "ampere_bf16_gemm", 100, 300, correlation=1),
        event("kernel", "elementwise_kernel", 200, 300, correlation=1),  # beside it
        event("kernel", "elementwise_kernel", 900, 400, correlation=1),  # past the end
    ]
    found = breakdown(events, 1, cuda=True)
    assert found.launches == 1
    assert found.busy_ms["GEMM"] == pytest.approx(0.3)
    assert found.busy_ms["other elementwise"] == pytest.approx(0.1 + 0.1)
    assert found.milliseconds(1.0)["idle"] == pytest.approx(0.5)


def test_on_a_cpu_a_moment_is_the_innermost_operators():
    events = [
        WHOLE,
        event("user_annotation", "encoder", 100, 200),
        event("cpu_op", "aten::linear", 150, 100),
        event("cpu_op", "aten::addmm", 160, 80),
        event("cpu_op", "aten::linear", 400, 100),
        event("cpu_op", "aten::addmm", 410, 60),
        event("cpu_op", "aten::copy_", 420, 20),
        event("cpu_op", "aten::_scaled_dot_product_flash_attention_for_cpu", 600, 50),
        event("cpu_op", "repa_fast::adaln_forward", 700, 50),
        event("cpu_op", "aten::native_layer_norm", 710, 30),
        event("cpu_op", "aten::mul", 800, 10),
        event("user_annotation", "Optimizer.step#AdamW.step", 900, 100),
        event("cpu_op", "aten::addmm", 900, 90),
    ]
    found = breakdown(events, 1, cuda=False)
    assert found.launches is None
    parts = found.milliseconds(found.window_ms)
    assert parts == pytest.approx(
        {
            "GEMM": 0.08,  # linear and addmm without the copy
            "attention": 0.05,
            "our kernels": 0.02,
            "other elementwise": 0.02 + 0.03 + 0.01,
            "optimizer": 0.09,
            "encoder": 0.1,
            "idle": 1.0 - 0.4,
        }
    )


def test_a_step_is_never_shorter_than_its_kernels():
    found = Breakdown(dict.fromkeys(CATEGORIES[:-1], 1.0), 9.0, 3.0)
    assert found.milliseconds(5.0)["idle"] == 0
    assert found.milliseconds(8.0)["idle"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    "name, category",
    [
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>(Params)", "GEMM"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "GEMM"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16", "GEMM"),
        ("void cublasLt::splitKreduce_kernel<32, 16>", "GEMM"),
        ("triton_tem_fused_addmm_3", "GEMM"),
        ("aten::convolution_backward", "GEMM"),
        ("aten::mm", "GEMM"),
        ("aten::mul", OTHER),
        ("triton_poi_fused_addmm_gelu_4", OTHER),
        ("triton_red_fused__scaled_dot_product_flash_attention_backward_1", OTHER),
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>", OTHER),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<96, 128, 64, 4>>", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k96_sm80", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_32x", "attention"),
        ("void cutlass::device_kernel<flash::enable_sm90<FlashAttnFwdSm90>>", "attention"),
        ("Memset (Device)", OTHER),
    ],
)
def test_kernels_by_name(name, category):
    assert step_profile.category_of(name) == category


def test_every_triton_kernel_of_ours_is_known():
    """By the decorated functions that a program is launched of, which end in _kernel."""
    found = []
    for path in (*ROOT.glob("kernels/*/triton_kernels.py"), ROOT / "repa_fast/backend/rows.py"):
        found += re.findall(r"@triton\.jit\w*\ndef (\w+_kernel)\(", path.read_text())
    assert len(found) >= 9
    assert {step_profile.category_of(name) for name in found} == {"our kernels"}


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


def assert_is_png(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_run_writes_a_row_a_report_a_picture_and_a_trace(tmp_path, capsys):
    trace = tmp_path / "trace.json"
    assert step.main([*DIGITS, "--out", str(tmp_path), "--trace", str(trace)]) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
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
    text = (tmp_path / "report.md").read_text()
    assert_report(text, row)
    assert row["command"] in capsys.readouterr().out
    assert_is_png(tmp_path / "shares.png")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {WINDOW, "encoder", "optimizer"} <= names


def assert_report(text: str, row: dict) -> None:
    for part in ("images/s", "MFU", "TFLOP/s", "peak GiB", "host ms", "launches", *CATEGORIES):
        assert part in text, part
    for part in (row["commit"], row["device"], row["torch"], f"`{row['command']}`"):
        assert part in text, part


def test_the_ladder_has_every_rung_and_its_ratios(tmp_path, capsys):
    rungs = ["a", "b", "d", "e", "h"]
    arguments = [*DIGITS, "--out", str(tmp_path), "--eager", "--rung", *rungs]
    assert ladder.main(arguments) == 0, capsys.readouterr().out
    rows = step_report.read(tmp_path / "rows.jsonl")
    assert [row["rung"] for row in rows] == rungs
    first, *others = rows
    assert first["precision"] == "float32" and {r["precision"] for r in others} == {"bfloat16"}
    for row in others[:-1]:
        assert row["loss"] == pytest.approx(first["loss"], rel=ladder.LOSS_TOLERANCE)
        assert row["ms_by_category"]["encoder"] > 0
    assert others[-1]["ms_by_category"]["encoder"] == 0
    assert others[-1]["gflop_per_image"] < first["gflop_per_image"]
    text = (tmp_path / "report.md").read_text()
    assert_report(text, first)
    for before, row in zip(rows, others):
        ratios = first["ms_p50"] / row["ms_p50"], before["ms_p50"] / row["ms_p50"]
        cells = f"{row['ms_p50']:.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} |"
        assert f"| ({row['rung']}) {row['what']} | {cells}" in text
    assert f"- (d) {others[1]['what']}: kernels: reference, since" in text
    assert "(not compiled)" in others[1]["what"] and "(not compiled)" not in others[0]["what"]
    assert_is_png(tmp_path / "shares.png")
    assert "floor" not in text


def test_every_rung_changes_one_that_there_is():
    assert ladder.bases(ladder.RUNGS["f"]) == ["g", "e", "d", "c", "b", "a"]
    assert [name for name, rung in ladder.RUNGS.items() if not ladder.bases(rung)] == ["a"]


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


def test_the_released_code_is_a_rung_where_its_folder_is_named(tmp_path, capsys):
    arguments = [*DIGITS, "--out", str(tmp_path / "out"), "--rung", "o"]
    assert ladder.main(arguments) == 0
    assert "rung o left out: --official names no folder" in capsys.readouterr().out
    folder = tmp_path / "released"
    (folder / "models").mkdir(parents=True)
    assert ladder.main([*arguments, "--official", str(folder)]) == 1
    assert f"ValueError: {folder} has no loss.py, expected a folder" in capsys.readouterr().out
    (folder / "models" / "sit.py").write_text(RELEASED)
    (folder / "loss.py").write_text(LOSS)
    assert ladder.main([*arguments, "--official", str(folder)]) == 0, capsys.readouterr().out
    (row,) = step_report.read(tmp_path / "out" / "rows.jsonl")
    assert row["status"] == "ok" and row["bases"] == ["a"]


def test_while_the_rival_is_timed_the_projects_model_is_gone(tmp_path, monkeypatch):
    seen = {}

    def figures(stepper, feed, arguments, trace):
        gc.collect()
        seen[type(stepper).__name__] = sum(type(one) is SiT for one in gc.get_objects()) - old
        return {}

    gc.collect()
    old = sum(type(one) is SiT for one in gc.get_objects())
    monkeypatch.setattr(step, "figures", figures)
    monkeypatch.setattr(step, "append", lambda folder, row: None)
    monkeypatch.setattr(ladder, "line", str)
    arguments = [*DIGITS, "--out", str(tmp_path), "--eager", "--rung", "b", "d"]
    options = flags(arguments)
    ladder.climb(options, tmp_path)
    assert seen == {"Baseline": 0, "Ours": 2}  # the model and its average


def flags(arguments: list[str]) -> argparse.Namespace:
    """What the ladder makes of its command line."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "results_folder", lambda name, where: None)
        patch.setattr(ladder, "climb", lambda options, folder: found.update(vars(options)) or [])
        assert ladder.main(arguments) == 0
    return argparse.Namespace(**found)


def test_a_wrong_loss_or_an_impossible_rung_gets_no_figure_and_the_next_one_runs(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(ladder, "expected_loss", lambda state, size: 123.0)
    monkeypatch.setattr(step, "figures", lambda *arguments: pytest.fail("was measured"))
    arguments = [*DIGITS, "--out", str(tmp_path), "--eager", "--rung", "a", "d"]
    assert ladder.main(arguments) == 1
    rows = step_report.read(tmp_path / "rows.jsonl")
    assert [row["rung"] for row in rows] == ["a", "d"]
    for row in rows:
        assert row["status"] == "failed" and "where plain fp32 has 123" in row["message"]
    text = (tmp_path / "report.md").read_text()
    assert "- (a) no figure: RuntimeError: loss" in text
    assert not (tmp_path / "shares.png").exists()


def row_of(**changes):
    row = dict.fromkeys(("ms_p20", "ms_p80", "images_per_second", "gflop_per_image"), 1.0)
    row |= dict.fromkeys(
        ("first_step_seconds", "mfu_of_matmul", "matmul_tflop_per_s", "peak_memory_gib"), 1.0
    )
    row |= {"preset": "sit-xl2-repa", "batch": 32, "micro_batch": 32, "rung": "a", "what": "x"}
    row |= {"status": "ok", "ms_p50": 90.0, "mfu": 0.1, "launches": 9876.0, "stall_ms": 0.0}
    row |= {"host_ms": 80.0, "profiled_ms": 95.0, "steps": 50, "warmup": 10, "compile": False}
    row |= {"precision": "float16", "data": "made up", "command": "c", "notes": []}
    row["bases"] = []
    row["ms_by_category"] = dict.fromkeys(CATEGORIES, 10.0)
    return {**row, **dict.fromkeys(STAMP, "?"), **changes}


@pytest.mark.parametrize(
    "changes, shown",
    [({}, True), ({"batch": 256}, False), ({"launches": None}, False), ({"rung": "b"}, False)],
)
def test_the_floor_stands_beside_rung_a_on_a_gpu_at_the_shape_it_was_counted_for(changes, shown):
    text = step_report.markdown([row_of(**changes)])
    assert ("9,876 launches, 90.0 ms" in text and "71.3 ms" in text) == shown


def test_a_report_has_the_last_row_of_each_rung_in_their_order(tmp_path):
    failed = {"rung": "c", "what": "x", "status": "failed", "message": "boom", "command": "c"}
    failed |= {"preset": "sit-xl2-repa", "batch": 32, **dict.fromkeys(STAMP, "?")}
    wrong = {**failed, "rung": "d"}
    large = row_of(batch=256, rung="e")
    rows = [large, row_of(rung="d"), row_of(ms_p50=1.0), {**failed, "rung": "a"}, failed, wrong]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, row_of()]))
    found = step_report.read(path)
    assert found == [row_of(), failed, wrong, large]
    step_report.write(tmp_path)
    assert_is_png(tmp_path / "shares.png")
    text = (tmp_path / "report.md").read_text()
    assert "- (c) no figure: boom" in text and "- (d) no figure: boom" in text


def test_single_steps_are_told_apart_by_how_they_ran(tmp_path):
    rows = [row_of(rung="", compile=False), row_of(rung="", compile=True, ms_p50=1.0)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    assert step_report.read(path) == rows
    text = step_report.markdown(rows)
    assert "| eager |" in text and "| compiled |" in text and "times (a)" not in text


def test_no_rung_begins_after_the_limit(tmp_path, capsys):
    options = flags([*DIGITS, "--out", str(tmp_path), "--limit", "-1"])
    assert ladder.climb(options, tmp_path) == []
    assert "time limit: rung a left out" in capsys.readouterr().out


def test_only_the_projects_own_step_is_a_measured_point_of_the_scaling_page(tmp_path):
    folder = tmp_path / "nvidia-h200" / "2026-01-01_ladder"
    folder.mkdir(parents=True)
    rows = [row_of(rung=rung) for rung in ("", *ladder.RUNGS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["rung"] for row in scaling.measured("sit-xl2-repa", tmp_path)] == ["", "g"]
