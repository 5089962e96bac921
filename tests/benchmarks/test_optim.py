import pytest
import torch

from benchmarks.harness.rows import read
from benchmarks.step import optim
from repa_fast.train.optim import AdamWEMA

CPU = torch.device("cpu")


def test_the_tensors_are_those_of_sit_xl_2_with_forty_bytes_per_parameter():
    sizes = optim.shapes()
    assert sum(torch.Size(shape).numel() for shape in sizes) == pytest.approx(683e6, rel=0.001)
    assert len(sizes) == 297  # with its projector's
    assert sum(optim.BYTES.values()) == 40


def test_rows_are_appended_and_an_absent_provider_has_its_reason(tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr("sys.argv", ["optim", "--device", "cpu", "--out", str(out)])
    monkeypatch.setattr(optim, "shapes", lambda: optim.SMALL)
    optim.main()
    rows = {row["provider"]: row for row in read(out)}
    assert rows.keys() == optim.PROVIDERS.keys()
    assert {rows[name]["status"] for name in ("torch", "stock", "official")} == {"ok"}
    assert rows["torch"]["ms_p20"] <= rows["torch"]["ms_p50"] <= rows["torch"]["ms_p80"]
    assert rows["cuda"]["status"] == "failed"
    assert "the tensors are on cpu" in rows["cuda"]["message"]


@pytest.mark.parametrize(
    "wrong", [{"lr": 1.01e-3}, {"betas": (0.9, 0.998)}, {"weight_decay": 0.02}]
)
def test_an_optimizer_that_is_a_little_wrong_gets_no_figure(monkeypatch, wrong):
    made = lambda *args, **options: AdamWEMA(*args, **options | wrong)  # noqa: E731
    monkeypatch.setattr(optim, "AdamWEMA", made)
    monkeypatch.setattr(optim, "GATED", ("torch",))
    row = optim.measure("torch", optim.SMALL, CPU)
    assert row["status"] == "failed" and row["message"].startswith("gate: ")


def test_ours_passes_the_gate_and_an_average_of_another_decay_does_not(monkeypatch):
    assert optim.why_wrong(optim.PROVIDERS["torch"], optim.SMALL, CPU) == ""
    monkeypatch.setattr(optim, "GATED", ("torch",))
    monkeypatch.setattr(optim.AdamWEMA, "_move_averages", lambda *args, **options: None)
    assert "average" in optim.measure("torch", optim.SMALL, CPU)["message"]
