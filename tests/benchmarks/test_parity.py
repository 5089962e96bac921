import json

import pytest
import torch

from benchmarks.step import parity

DIGITS = ["--preset", "digits", "--device", "cpu", "--batch", "4", "--eager", "--train", "3"]


def test_a_rung_is_compared_with_fp32_and_with_plain_bf16(tmp_path, capsys):
    assert parity.main([*DIGITS, "--rung", "i", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["rung"] for row in rows] == ["bf16", "i"]
    usual, residual = rows
    text = (tmp_path / "report.md").read_text()
    for row in rows:
        assert row["gradients"] > 70 and len(row["losses"]) == row["steps"] == 3
        assert 0.999 < row["least_cosine"] < 1
        assert row["exact_losses"] == usual["exact_losses"] != row["losses"]
        assert f"{row['least_cosine']:.6f} | {row['least_cosine_of']} |" in text
    assert residual["least_cosine"] < usual["least_cosine"]  # its stream is rounded as well
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert "(i) (g) + bf16 residual stream" in capsys.readouterr().out


def test_the_worst_gradients_are_named():
    exact = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, 0.0]), "c": torch.ones(2)}
    found = {"a": torch.tensor([4.0, 3.0]), "b": torch.tensor([1.5, 0.0]), "c": torch.ones(2)}
    row = parity.compare(found, exact)
    assert (row["least_cosine_of"], row["norm_ratio_of"]) == ("a", "b")
    assert row["least_cosine"] == pytest.approx(24 / 25) and row["norm_ratio"] == 1.5
    with pytest.raises(RuntimeError, match=r"gradients of \{'c'\} in one of two runs only"):
        parity.compare({name: found[name] for name in "ab"}, exact)


def test_a_gradient_that_is_not_finite_is_named():
    exact = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(RuntimeError, match="not finite: b"):
        parity.compare({"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}, exact)


def test_losses_are_apart_by_their_mean_difference_over_their_mean_size():
    assert parity.distance([1.1, -1.0, 2.0], [1.0, -1.0, 3.0]) == pytest.approx(1.1 / 5)
    assert parity.distance([], []) is None


@pytest.mark.parametrize(
    "change, missed",
    [
        ({}, []),
        ({"least_cosine": 0.9989}, ["cosine of x below 0.999"]),
        ({"norm_ratio": 0.989}, ["norm of y off by more than 1%"]),
        ({"loss_distance": 2.1e-3}, ["losses more than 2 times as far from fp32 as plain bf16's"]),
        ({"least_cosine": float("nan")}, ["cosine of x below 0.999"]),
        ({"steps": 0, "loss_distance": None}, []),
    ],
)
def test_what_a_rung_does_not_hold_is_said(change, missed):
    row = {"least_cosine": 0.9995, "least_cosine_of": "x", "norm_ratio": 1.009}
    row |= {"norm_ratio_of": "y", "steps": 300, "loss_distance": 1.9e-3}
    assert parity.misses(row | change, {"loss_distance": 1e-3}) == missed


def test_the_command_fails_where_a_rung_does_not_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "parity", lambda arguments: rows)
    rows = [{"misses": []}, {"misses": ["something"]}]
    monkeypatch.setattr(parity, "misses", lambda row, usual: row["misses"])
    monkeypatch.setattr(parity, "markdown", lambda rows: "")
    arguments = ["--preset", "digits", "--device", "cpu", "--train", "0", "--out", str(tmp_path)]
    assert parity.main(arguments) == 1
    del rows[1]
    assert parity.main(arguments) == 0
