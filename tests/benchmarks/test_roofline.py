import pytest

from benchmarks.harness.rows import append
from benchmarks.paper import roofline
from benchmarks.paper.scaling_model import Machine
from benchmarks.step import traffic
from repa_fast.configs import presets

GATE = {"op": "gate_residual_adaln", "shape": [32, 256, 1152], "dtype": "fp32", "mode": "forward"}
STAMP = {"device": "NVIDIA H200", "commit": "abc1234", "status": "ok"}
PARTS = {"GEMM": 30.0, "attention": 4.0, "our kernels": 3.0, "other elementwise": 4.0}
PARTS |= {"optimizer": 4.5, "encoder": 2.5, "idle": 2.0}
STEP = {"preset": "sit-xl2-repa", "batch": 32, "rung": "one-pass"}
STEP |= {"compile": True, "data": "made up", "ms_p50": 50.0, "stall_ms": 0.0}
STEP["ms_by_category"] = PARTS


@pytest.fixture(scope="module")
def counted():
    return roofline.work(presets.get(roofline.PRESET))


@pytest.fixture
def tables(tmp_path, counted, monkeypatch):
    """tables(*rows, device="nvidia-h200") -> the tables where these rows are what there is."""
    monkeypatch.setattr(roofline, "work", lambda config: counted)

    def made(*rows, device="nvidia-h200"):
        path = tmp_path / device / "a" / "rows.jsonl"
        path.unlink(missing_ok=True)
        append(path, *(row | STAMP for row in rows))
        return roofline.tables(tmp_path)

    return made


def cells(text, *start):
    """The cells of the one line that begins with these."""
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    (line,) = (line for line in found if line[: len(start)] == list(start))
    return line


def test_the_committed_page_is_current():
    text, page = roofline.tables(roofline.RESULTS), roofline.PAGE.read_text()
    assert roofline.filled(page, "roofline", text) == page


def test_nothing_counts_that_was_not_measured_on_a_gpu(tables):
    text = tables({**GATE, "provider": "ours", "ms_p50": 1.0}, STEP, device="cpu")
    assert "1.00" not in text and "abc1234" not in text
    assert text.count(roofline.NOT_YET) == 12 + 2 * 7


def test_a_measured_op_stands_beside_its_floor(tables):
    times = (("inductor", 0.001), ("ours", 0.2), ("ours", 0.05))
    text = tables(*({**GATE, "provider": name, "ms_p50": ms} for name, ms in times))
    line = cells(text, GATE["op"], "32x256x1152", "fp32", "forward")
    # x and out in fp32, branch and y in bf16, three vectors in bf16
    nbytes = 32 * 256 * 1152 * (4 + 4 + 2 + 2) + 3 * 32 * 1152 * 2
    floor = 1e3 * nbytes / 4.3e12
    assert float(line[6]) == pytest.approx(floor, rel=1e-3)
    assert line[7] == "0.05" and float(line[8]) == pytest.approx(0.05 / floor, rel=5e-3)
    assert line[9] == "NVIDIA H200, abc1234"


def test_attention_is_that_of_the_fastest_backend(tables):
    shape = {"op": "attention", "shape": [32, 16, 256, 72], "dtype": "bf16", "mode": "backward"}
    text = tables(*(shape | {"provider": f"{ms}", "ms_p50": ms} for ms in (0.3, 0.2)))
    assert cells(text, "attention", "32x16x256x72", "bf16", "backward")[7] == "0.2"


@pytest.mark.parametrize("change", ({"rung": "tuned"}, {"compile": False}, {"data": "photographs"}))
def test_a_step_of_another_kind_is_not_ours(tables, change):
    assert "abc1234" in tables(STEP)
    assert "abc1234" not in tables(STEP | change)


def test_the_parts_of_a_step_add_up_and_the_step_is_the_graph_where_there_is_one(tables):
    text = tables(STEP).split("| sit-xl2-repa")[1]
    lines = [cells(text, name) for name in (*roofline.CATEGORIES, "sum", "the step")]
    *parts, together, whole = (float(line[4]) for line in lines)
    assert sum(parts) == together == 50 - PARTS["idle"] and whole == 50
    *floors, least, same = (float(line[3]) for line in lines)
    assert sum(floors) == pytest.approx(least, abs=0.3)  # one digit each
    assert least == same
    of_parts = dict(zip(roofline.CATEGORIES, floors))
    assert of_parts["matmuls"] == pytest.approx(28.3, abs=0.1)  # by hand, layer by layer
    moved = 28 * traffic.moved("block", 32) + traffic.moved("outside", 32)
    assert of_parts["elementwise"] == pytest.approx(1e3 * moved / 4.3e12, abs=0.1)
    graph = {**STEP, "rung": "graph", "ms_p50": 41.0, "ms_by_category": {"GEMM": 41.0}}
    text = tables(graph, STEP).split("| sit-xl2-repa")[1]
    assert float(cells(text, "the step")[4]) == 41 and float(cells(text, "matmuls")[4]) == 30


def test_floors_are_those_of_the_card_that_was_measured(tables):
    card = {"item": "card", "copy_tb_per_s": 2.0, "matmul_tflop_per_s": 400.0}
    text = tables(card | {"date": "2026-01-01"})
    assert "400 TFLOP/s in a bf16 matmul, 2.00 TB/s in a copy (NVIDIA H200, measured" in text
    least = float(cells(text.split("256 images")[0], "matmuls")[3])
    assert least == pytest.approx(22.36e3 / 400, rel=0.01)


def test_a_large_batch_is_several_forward_passes():
    small, large = roofline.elementwise_bytes(32), roofline.elementwise_bytes(256)
    assert large == 2 * roofline.elementwise_bytes(128) and 7 * small < large < 9 * small
    assert roofline.elementwise_bytes(32, "bf16") < small


def test_what_is_expected_adds_up_and_attention_is_as_measured(tables):
    attention = {"op": "attention", "dtype": "bf16", "provider": "sdpa", "ms_p50": 0.25}
    shapes = ([32, 16, 256, 72], [32, 12, 257, 64])
    rows = [attention | {"shape": s, "mode": m} for s in shapes for m in traffic.PASSES]
    text = tables(*rows).split("expected ms")[1]
    columns = [[float(cell) for cell in cells(text, part)[1:]] for part in roofline.CATEGORIES]
    assert columns[1] == [14.0] * 4  # 28 blocks
    sums = [float(cell) for cell in cells(text, "sum")[1:]]
    assert [sum(each) for each in zip(*columns)] == pytest.approx(sums, abs=0.3)
    assert sums[1] < sums[0] > sums[2]
    block = sum(row["launches"] for row in traffic.committed("block", 32))
    assert 28 * block < int(cells(text, "launch sites")[1].replace(",", "")) < 28 * block + 300


def test_an_op_is_held_by_what_takes_longer():
    counts = ((790e9, 4.3e9), (2 * 790e9, 4.3e9), (790e9, 3 * 4.3e9))
    found = [roofline.floor(*count, Machine()) for count in counts]
    assert found == pytest.approx([1, 2, 3])
