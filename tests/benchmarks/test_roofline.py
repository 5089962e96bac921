import json

import pytest

from benchmarks.paper import roofline
from benchmarks.paper.scaling_model import Machine

GATE = {"op": "gate_residual_adaln", "shape": [32, 256, 1152], "dtype": "fp32"}
STAMP = {"device": "NVIDIA H200", "commit": "abc1234", "status": "ok"}
STEP = {
    **{"preset": "sit-xl2-repa", "batch": 32, "rung": "e", "compile": True, "data": "made up"},
    **{"ms_p50": 50.0, "stall_ms": 0.0},
    "ms_by_category": {
        **{"GEMM": 30.0, "attention": 4.0, "our kernels": 3.0, "other elementwise": 4.0},
        **{"optimizer": 4.5, "encoder": 2.5, "idle": 2.0},
    },
}


def tables(folder, device, *rows):
    """The tables where these rows are what there is."""
    target = folder / device / "a"
    target.mkdir(parents=True)
    (target / "rows.jsonl").write_text("".join(json.dumps(row | STAMP) + "\n" for row in rows))
    return roofline.tables(folder)


def cells(text, *start):
    """The cells of the one line that begins with these."""
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    found = [line for line in found if line[: len(start)] == list(start)]
    assert len(found) == 1
    return found[0]


def test_the_committed_page_is_current():
    text, page = roofline.tables(roofline.RESULTS), roofline.PAGE.read_text()
    assert roofline.filled(page, "roofline", text) == page


def test_nothing_counts_that_was_not_measured_on_a_gpu(tmp_path):
    row = {**GATE, "mode": "forward", "provider": "ours", "ms_p50": 1.0}
    text = tables(tmp_path, "cpu", row, STEP)
    assert "1.00" not in text and "abc1234" not in text
    assert text.count(roofline.NOT_YET) == 12 + 2 * 7


def test_a_measured_op_stands_beside_its_floor(tmp_path):
    rows = (
        {**GATE, "mode": "forward", "provider": "inductor", "ms_p50": 0.001},
        {**GATE, "mode": "forward", "provider": "ours", "ms_p50": 0.2},
        {**GATE, "mode": "forward", "provider": "ours", "ms_p50": 0.05},
    )
    # x and out in fp32, branch and y in bf16, three vectors in bf16
    nbytes = 32 * 256 * 1152 * (4 + 4 + 2 + 2) + 3 * 32 * 1152 * 2
    line = cells(
        tables(tmp_path, "nvidia-h200", *rows), GATE["op"], "32x256x1152", "fp32", "forward"
    )
    floor = 1e3 * nbytes / 4.3e12
    assert float(line[6]) == pytest.approx(floor, rel=1e-3)
    assert line[7] == "0.05" and float(line[8]) == pytest.approx(0.05 / floor, rel=5e-3)
    assert line[9] == "NVIDIA H200, abc1234"


def test_attention_is_that_of_the_fastest_backend(tmp_path):
    shape = {"op": "attention", "shape": [32, 16, 256, 72], "dtype": "bf16", "mode": "backward"}
    rows = [{**shape, "provider": name, "ms_p50": ms} for name, ms in (("a", 0.3), ("b", 0.2))]
    line = cells(
        tables(tmp_path, "nvidia-h200", *rows), "attention", "32x16x256x72", "bf16", "backward"
    )
    assert line[7] == "0.2"


@pytest.mark.parametrize("change", ({"rung": "d"}, {"compile": False}, {"data": "photographs"}))
def test_a_step_of_another_kind_is_not_ours(tmp_path, change):
    assert "abc1234" in tables(tmp_path, "nvidia-h200", STEP)
    assert "abc1234" not in tables(tmp_path / "other", "nvidia-h200", STEP | change)


def test_the_parts_of_a_step_add_up(tmp_path):
    text = tables(tmp_path, "nvidia-h200", STEP).split("| sit-xl2-repa")[1]
    names = (*roofline.CATEGORIES, "sum", "the step")
    lines = {name: cells(text, name) for name in names}
    *parts, together, whole = (float(lines[name][4]) for name in names)
    assert sum(parts) == together == 50 - STEP["ms_by_category"]["idle"] and whole == 50
    *floors, least, same = (float(lines[name][3]) for name in names)
    assert sum(floors) == pytest.approx(least, abs=0.3)  # one digit each
    assert least == same == pytest.approx(47.0, rel=0.01)  # counted by hand, layer by layer


def test_the_step_is_the_graph_where_there_is_one_and_its_parts_are_told_apart_without(tmp_path):
    graph = {**STEP, "rung": "g", "ms_p50": 41.0, "ms_by_category": {"GEMM": 41.0}}
    text = tables(tmp_path, "nvidia-h200", graph, STEP).split("| sit-xl2-repa")[1]
    assert float(cells(text, "the step")[4]) == 41 and float(cells(text, "matmuls")[4]) == 30


def test_floors_are_those_of_the_card_that_was_measured(tmp_path):
    card = {"item": "card", "copy_tb_per_s": 2.0, "matmul_tflop_per_s": 400.0, "date": "2026-01-01"}
    text = tables(tmp_path, "nvidia-h100", card)
    assert "400 TFLOP/s in a bf16 matmul, 2.00 TB/s in a copy (NVIDIA H200, measured" in text
    least = float(cells(text.split("256 images")[0], "matmuls")[3])
    assert least == pytest.approx(22.36e3 / 400, rel=0.01)


def test_an_op_is_held_by_what_takes_longer():
    machine = Machine()
    assert roofline.floor(790e9, 4.3e9, machine) == pytest.approx(1)
    assert roofline.floor(2 * 790e9, 4.3e9, machine) == pytest.approx(2)
    assert roofline.floor(790e9, 3 * 4.3e9, machine) == pytest.approx(3)
