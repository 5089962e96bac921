"""The last metrics and scores of a run's folder, and what becomes of a stranger's."""

import json
import os

import pytest

from repa_fast.eval import records
from repa_fast.eval.records import describe_records


@pytest.fixture
def put(tmp_path):
    """(name, content) -> writes a file of a run; returns what is said of all."""

    def put(name: str, content) -> list[str]:
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return describe_records(tmp_path)

    return put


def test_a_run_that_has_written_nothing_yet_says_nothing(tmp_path, put):
    assert describe_records(tmp_path) == []
    assert put("metrics.jsonl", "") == put("evals.jsonl", "") == []


def test_the_last_lines_are_said(put):
    line = {"step": 400000, "loss": 0.512345, "images_per_second": 0.8519, "mfu": None}
    lines = json.dumps({**line, "step": 399900}) + "\n" + json.dumps(line) + "\n"
    metrics = ["metrics at step 400000: loss 0.5123, 0.852 images/s"]
    assert put("metrics.jsonl", lines) == metrics
    assert put("metrics.jsonl", lines + '{"step": 4001') == metrics, "cut off by a crash"
    assert put("metrics.jsonl", {"step": 5, "loss": None}) == ["metrics at step 5: loss -"]
    long = (json.dumps(line) + "\n") * 30000
    assert len(long) > 1.5 * records.MOST_BYTES and put("metrics.jsonl", long) == metrics
    scores = {"step": 400000, "FID": 12.3456, "KID (1000 images)": 0.00123456}
    assert put("evals.jsonl", scores)[1:] == [
        "evaluation at step 400000: FID 12.35, KID (1000 images) 0.001235"
    ]
    assert put("evals.jsonl", {"step": 9, "failed": "no\nmemory"})[1:] == [
        r"evaluation at step 9 failed: 'no\nmemory'"
    ]


def test_scores_are_said(put):
    scores = {"step": 1600, "samples": 500, "class_accuracy": 0.951, "alignment_cosine": None}
    assert put("scores.json", scores) == [
        "scores.json: step 1600, samples 500, class_accuracy 0.951"
    ]
    point = {"step": None, "cfg_scale": 1.5, "guidance_high": 1.0, "FID": 9.5}
    points = [point, point | {"cfg_scale": 1.8, "FID": 3}]
    assert put("generated/sweep.json", {"points": points, "features": "inception"})[1:] == [
        "generated/sweep.json: 2 points, cfg_scale 1.5 to 1.8, guidance_high 1, FID 3 to 9.5"
    ]
    assert put("generated/sweep.json", {"points": []})[1:] == ["generated/sweep.json: 0 points"]
    described = {"scores": {"FID": 2.5, "recall": 0.6}, "samples": {"name": "x", "count": 50000}}
    put("generated/a.inception.json", described)
    assert put("generated/a.json", {"settings": 1})[2:] == [
        "generated/a.inception.json: FID 2.5, recall 0.6, samples 50000"
    ]


DEEP = "[" * 10**5
DAMAGED = {
    "metrics.jsonl": ["{", "[]\n", "3\n3\n", "\xff", DEEP, '{"step": 1}\n[]\n{'],
    "evals.jsonl": ["{", '"x"'],
    "scores.json": ["", "{", "[1]", DEEP, '{"a": 1' + " " * 2**20 + "}"],
    "generated/sweep.json": ["{}", '{"points": 3}', '{"points": [[1]]}'],
    "generated/a.json": ["{", '{"scores": [1]}', "[]"],
}


CASES = [(name, text) for name, texts in DAMAGED.items() for text in texts]


@pytest.mark.parametrize("name, content", CASES, ids=range(len(CASES)))
def test_what_is_damaged_is_one_line(put, name, content):
    lines = put(name, content)
    assert len(lines) == 1 and len(lines[0]) < 300
    assert lines[0].startswith(f"{name.rpartition('/')[2]} is left out: ")


def test_pipes_devices_and_what_cannot_be_read_are_left_out(tmp_path, put):
    os.mkfifo(tmp_path / "metrics.jsonl")
    os.symlink("/dev/zero", tmp_path / "scores.json")
    (tmp_path / "generated" / "sweep.json").mkdir(parents=True)
    assert [line.split(":")[0] for line in put("evals.jsonl", {"step": 3, "FID": 1})] == [
        "metrics.jsonl is left out",
        "evaluation at step 3",
        "scores.json is left out",
        "sweep.json is left out",
    ]


def test_what_a_stranger_writes_is_cut_off(tmp_path, put):
    odd = {"\x1b[31m" + "a" * 10**5: 1, "b\nc": float("nan"), "huge": 10**3000, "text": "x"}
    (line,) = put("scores.json", odd)
    assert line == f"scores.json: ?[31m{'a' * 55} 1, b c nan, huge an integer of 9966 bits"
    (line,) = put("scores.json", {f"n{i}": i for i in range(50)})
    assert line.endswith(", n19 19, ...")
    odd = {"step": "x" * 10**5, "loss": 1e400, "images_per_second": 1e300}
    line, _ = put("metrics.jsonl", odd)
    assert len(line) < 120 and line.endswith("loss inf")
    (tmp_path / "generated").mkdir()
    for number in range(records.FILES_READ + 4):
        (tmp_path / "generated" / f"{number:03d}.json").write_text('{"scores": {"FID": 1}}')
    lines = put("generated/last.json", {"scores": {"FID": 1}})
    assert len(lines) == 2 + records.FILES_READ + 1 and lines[-1] == "generated: 5 more files"
