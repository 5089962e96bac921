import json

import pytest
import torch

from benchmarks import gemm

CPU = torch.device("cpu")


def test_the_twelve_products_of_xl_have_the_flops_of_its_linear_layers():
    """Forward 2 (3 + 1 + 4 + 4) D^2 per row, and as much for each gradient."""
    found = gemm.shapes("SiT-XL/2", 8192)
    assert len(found) == 12
    assert found["qkv forward"] == (8192, 1152, 3456)
    assert found["proj weight gradient"] == (1152, 8192, 1152)
    assert sum(m * k * n for m, k, n in found.values()) == 3 * 12 * 1152**2 * 8192


@pytest.mark.parametrize("name", ["fc1 forward", "fc2 input gradient", "qkv weight gradient"])
def test_operands_have_the_shapes_and_strides_of_training(name):
    layer = torch.nn.Linear(4, 6, bias=False)
    x, gradient = torch.randn(8, 4), torch.randn(8, 6)
    real = {
        "fc1 forward": (x, layer.weight.t()),
        "fc2 input gradient": (gradient, layer.weight),
        "qkv weight gradient": (gradient.t(), x),
    }[name]
    shape = (*real[0].shape, real[1].shape[1])
    for made, tensor in zip(gemm.operands(name, shape, CPU), real, strict=True):
        assert made.shape == tensor.shape and made.stride() == tensor.stride()


def test_a_wrong_product_gets_no_figure():
    with pytest.raises(RuntimeError, match="from fp32, expected at most"):
        gemm.time_of(lambda a, b: 1.01 * (a @ b), "fc1 forward", (16, 8, 24), CPU)


def test_every_product_has_a_row_and_a_rate(tmp_path, capsys):
    arguments = ["--model", "SiT-S/8", "--batch", "1", "--tokens", "16", "--device", "cpu"]
    assert gemm.main([*arguments, "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == list(gemm.shapes("SiT-S/8", 16))
    for row in rows:
        m, k, n = row["shape"]
        assert row["tflop_per_s"] == pytest.approx(2 * m * k * n / (row["p50"] / 1e3) / 1e12)
    assert "fc2 weight gradient | 384 x 16 x 1536 | torch |" in capsys.readouterr().out
