from argparse import Namespace

import pytest
import torch

from benchmarks.harness.rows import read
from benchmarks.step import ladder, parity
from tests.refusals import refused

DIGITS = ["--preset", "digits", "--device", "cpu", "--batch", "8", "--eager"]


@pytest.mark.usefixtures("tiny_digits", "coarse_pictures")
def test_a_configuration_is_compared_with_fp32_and_with_plain_bf16(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parity, "LOSS_RATIO", 10.0)  # three losses say little
    flags = ["--train", "3", "--rung", "bf16-residual", "--out", str(tmp_path)]
    assert parity.main([*DIGITS, *flags]) == 0
    rows = read(tmp_path / "rows.jsonl")
    assert [row["rung"] for row in rows] == ["bf16", "bf16-residual"]
    usual, residual = rows
    text = (tmp_path / "report.md").read_text()
    for row in rows:
        assert row["gradients"] > 40 and len(row["losses"]) == row["steps"] == 3
        assert 0.999 < row["least_cosine"] < 1
        assert row["exact_losses"] == usual["exact_losses"] != row["losses"]
        assert f"{row['least_cosine']:.6f} | {row['least_cosine_of']} |" in text
    assert residual["least_cosine"] < usual["least_cosine"]  # its stream is rounded as well
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert "| bf16-residual | graph + bf16 residual stream |" in capsys.readouterr().out


def test_what_is_compared_with_runs_no_kernel_of_ours_on_a_gpu_either():
    on_gpu = Namespace(device="cuda", eager=False, precision="bf16")
    for rung in (parity.EXACT, parity.USUAL):
        assert ladder.settings(rung, on_gpu).items() >= parity.PLAIN.items()
    for name in parity.OURS:
        assert ladder.settings(ladder.RUNGS[name], on_gpu)["kernels"] == "triton"


def test_wide_matmuls_are_those_of_fp32_rounded_once_in_both_passes():
    """Also of those that a batch, a bias or autocast asks for."""
    x, w, b, y = (torch.randn(shape) for shape in ((3, 40, 64), (50, 64), (50,), (3, 64, 5)))
    calls = (
        lambda x: torch.nn.functional.linear(x[0], w.to(x.dtype), b.to(x.dtype)),
        lambda x: x[0] @ w.to(x.dtype).T,
        lambda x: x @ y.to(x.dtype),
    )
    x, w, b, y = (tensor.bfloat16().float() for tensor in (x, w, b, y))
    for call in calls:
        exact, narrow = x.clone().requires_grad_(), x.bfloat16().requires_grad_()
        expected = call(exact)
        expected.sum().backward()
        with parity.WideMatmuls(), torch.autocast("cpu", torch.bfloat16):
            found = call(narrow)
            found.sum().backward()
        assert torch.equal(found, expected.bfloat16())
        assert torch.equal(narrow.grad, exact.grad.bfloat16())


def test_the_worst_gradients_are_named():
    exact = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, 0.0]), "c": torch.ones(2)}
    found = {"a": torch.tensor([4.0, 3.0]), "b": torch.tensor([1.5, 0.0]), "c": torch.ones(2)}
    row = parity.compare(found, exact)
    assert (row["least_cosine_of"], row["norm_ratio_of"]) == ("a", "b")
    assert row["least_cosine"] == pytest.approx(24 / 25) and row["norm_ratio"] == 1.5
    fewer, spoilt = {n: found[n] for n in "ab"}, found | {"b": torch.tensor([1.0, torch.nan])}
    words = r"gradients of \{'c'\} in one of two runs only"
    refused(lambda: parity.compare(fewer, exact), words, error=RuntimeError)
    refused(lambda: parity.compare(spoilt, exact), "not finite: b$", error=RuntimeError)


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
def test_what_a_configuration_does_not_hold_is_said_and_the_command_fails(
    tmp_path, monkeypatch, change, missed
):
    usual = {"least_cosine": 0.9995, "least_cosine_of": "x", "norm_ratio": 1.009, "rung": "bf16"}
    usual |= {"norm_ratio_of": "y", "steps": 300, "loss_distance": 1e-3}
    row = {**usual, "rung": "bf16-residual", "loss_distance": 1.9e-3, **change}
    assert parity.misses(row, usual) == missed
    monkeypatch.setattr(parity, "parity", lambda arguments: [usual, row])
    monkeypatch.setattr(parity, "markdown", lambda rows: "")
    assert parity.main([*DIGITS, "--train", "0", "--out", str(tmp_path)]) == bool(missed)
