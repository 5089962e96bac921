"""The twelve matrix products of a block: `python -m benchmarks.gemm --model SiT-XL/2 --batch 32`.

The four linear layers forward, backward to their input and to their weight, each by torch (cuBLAS),
by what torch.compile's max-autotune finds, and for weights with a result in fp32, as training wants
it. Rates are beside that of a large square product in the same run; a result that differs from the
product in fp32 gets no figure. Appends a row for each, and writes report.md.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.environment import stamp
from benchmarks.step import results_folder
from benchmarks.timing import MATMUL_SIDE, Effort, matmul_rate, measure, own_stream, sets_needed
from repa_fast.models.sit import size

EFFORT = Effort(graph_ms=5.0, rounds=10, warmup=3)
TOLERANCE = 2**-7
"""Of a result's distance from fp32's over its norm; rounding it to bf16 costs 2^-9 at the most."""

DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def shapes(model: str, rows: int) -> dict[str, tuple[int, int, int]]:
    """(m, k, n) of each product of (m, k) and (k, n) matrices, by layer and pass.

    Weights are (out, in), as torch keeps them.
    """
    width = size(model)["hidden_size"]
    layers = {"qkv": (width, 3 * width), "proj": (width, width)}
    layers |= {"fc1": (width, 4 * width), "fc2": (4 * width, width)}
    found = {}
    for name, (inputs, outputs) in layers.items():
        found[f"{name} forward"] = (rows, inputs, outputs)
        found[f"{name} input gradient"] = (rows, outputs, inputs)
        found[f"{name} weight gradient"] = (outputs, rows, inputs)
    return found


def operands(name: str, shape: tuple[int, int, int], device: torch.device) -> list[torch.Tensor]:
    """Random matrices with the strides that they have in training; bf16, on a CPU fp32."""
    m, k, n = shape

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device=device).to(DTYPE[device.type])

    if name.endswith("forward"):
        return [random(m, k), random(n, k).t()]
    if name.endswith("input gradient"):
        return [random(m, k), random(k, n)]
    return [random(k, m).t(), random(k, n)]


def into_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product in fp32, its sums not rounded."""
    return torch.mm(a, b, out_dtype=torch.float32)


def ways(name: str, device: torch.device) -> dict[str, Product]:
    """How a product can be had; on a CPU by torch alone."""
    if device.type != "cuda":
        return {"torch": torch.mm}
    found = {
        "torch": torch.mm,
        "max-autotune": torch.compile(torch.mm, mode="max-autotune-no-cudagraphs", dynamic=False),
    }
    if name.endswith("weight gradient"):
        found["torch, fp32 result"] = into_fp32
    return found


def time_of(product: Product, name: str, shape: tuple, device: torch.device) -> dict:
    """Figures of one product.

    Raises:
        RuntimeError: its result is not that of fp32.
    """
    m, k, n = shape
    touched = DTYPE[device.type].itemsize * (m * k + k * n + m * n)
    sets = [operands(name, shape, device) for _ in range(sets_needed(touched, device))]
    expected = sets[0][0].float() @ sets[0][1].float()
    error = (product(*sets[0]).float() - expected).norm() / expected.norm()
    if not error <= TOLERANCE:
        raise RuntimeError(f"{error.item():.1e} from fp32, expected at most {TOLERANCE:.1e}")
    with own_stream(device):
        timing = measure([lambda pair=pair: product(*pair) for pair in sets], device, EFFORT)
    return {**asdict(timing), "tflop_per_s": 2e-9 * m * k * n / timing.p50}


def markdown(rows: list[dict]) -> str:
    """The report."""
    first = rows[0]
    lines = [
        f"# Products of a block of {first['model']}, {first['rows']:,} rows, {first['dtype']}",
        "",
    ]
    lines += [f"- {name}: {first[name]}" for name in stamp()]
    side, peak = first["square"], first["square_tflop_per_s"]
    lines += [f"- a product of {side}^3: {peak:,.4g} TFLOP/s", ""]
    lines += ["| product | m x k x n | way | ms | TFLOP/s | of that |", "|---|---|---|---|---|---|"]
    for row in rows:
        sizes = " x ".join(map(str, row["shape"]))
        if row["status"] != "ok":
            lines.append(f"| {row['name']} | {sizes} | {row['way']} | {row['message']} | | |")
            continue
        lines.append(
            f"| {row['name']} | {sizes} | {row['way']} | {row['p50']:.4f} | "
            f"{row['tflop_per_s']:,.4g} | {row['tflop_per_s'] / peak:.0%} |"
        )
    best: dict[str, float] = {}
    for row in rows:
        if row["status"] == "ok":
            best[row["name"]] = min(row["p50"], best.get(row["name"], float("inf")))
    lines += ["", f"The fastest of each, together: {sum(best.values()):.3f} ms a block.", ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Time all products; 1 if one has no figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="SiT-XL/2")
    parser.add_argument("--batch", type=int, default=32, help="images")
    parser.add_argument("--tokens", type=int, default=256, help="of an image")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for rows and report")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    folder = results_folder("gemm", arguments)
    rate = matmul_rate(DTYPE[device.type], device) / 1e12
    common = {"model": arguments.model, "rows": arguments.batch * arguments.tokens, **stamp()}
    common |= {"dtype": str(DTYPE[device.type]).removeprefix("torch.")}
    common |= {"square": MATMUL_SIDE[device.type], "square_tflop_per_s": rate}
    rows = []
    for name, shape in shapes(arguments.model, common["rows"]).items():
        for way, product in ways(name, device).items():
            row = {**common, "name": name, "shape": shape, "way": way, "status": "ok"}
            try:
                row |= time_of(product, name, shape, device)
            except Exception as error:  # compilers raise anything; the next product may run
                row |= {"status": "failed", "message": f"{type(error).__name__}: {error}"}
            rows.append(row)
            with open(folder / "rows.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            (folder / "report.md").write_text(markdown(rows))
    print((folder / "report.md").read_text())
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
