"""The optimizer's step on SiT-XL/2's tensors: `python -m benchmarks.step.optim`.

A step is the gradient norm, clipping, AdamW and the moving average. Ours is first compared with
the reference on the same tensors, and gets no figure where it is wrong.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks.harness import timing
from benchmarks.harness.environment import results_folder, stamp
from repa_fast.kernels.adamw_ema.reference import adamw_ema_reference, sum_of_squares_reference
from repa_fast.models.sit import SiT, size
from repa_fast.testing import assert_within_budget
from repa_fast.train.optim import AdamWEMA, clip_factor

LR, BETAS, EPS, DECAY, MAX_NORM, EMA = 1e-3, (0.9, 0.999), 1e-8, 0.01, 1.0, 0.9
SMALL = ((3,), (0,), (8192,), (8193,), (72, 72), (5, 1001))
BYTES = {  # per parameter in fp32: what one pass and a reading for the norm have to move
    "read": 4 + 5 * 4,  # norm: gradient; then gradient, parameter, two moments, average
    "written": 4 * 4,  # parameter, two moments, average
}
GATE_STEPS = 3
GATED = ("cuda",)  # the others are torch's and apex's code, rounded in their own way

Step = Callable[[], None]


def shapes() -> list[tuple[int, ...]]:
    """Of SiT-XL/2's trained parameters, with a projector to 768 columns."""
    with torch.device("meta"):
        model = SiT(**size("SiT-XL/2"))
    return [tuple(p.shape) for p in model.parameters() if p.requires_grad]


def parameters(sizes: Sequence[tuple[int, ...]], device: torch.device) -> list[nn.Parameter]:
    """Random parameters with random gradients, whose norm is far above MAX_NORM."""
    generator = torch.Generator(device).manual_seed(0)
    found = [
        nn.Parameter(torch.randn(shape, generator=generator, device=device)) for shape in sizes
    ]
    for p in found:
        p.grad = torch.randn(p.shape, generator=generator, device=device)
    return found


class Trained:
    """Parameters, their average, and a step that a provider makes of them."""

    def __init__(self, params: list[nn.Parameter], step: Step, moments: Callable, average):
        self.params, self.step, self.moments, self.average = params, step, moments, average


def ours(params: list[nn.Parameter], implementation: str) -> Trained:
    """AdamWEMA."""
    average = [p.detach().clone() for p in params]
    optimizer = AdamWEMA(
        params, [average], [EMA], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY,
        implementation=implementation,
    )  # fmt: skip

    def step() -> None:
        optimizer.step(grad_scale=clip_factor(optimizer.gradient_norm(), MAX_NORM))

    return Trained(params, step, lambda p: optimizer.state[p], average)


def stock(params: list[nn.Parameter]) -> Trained:
    """The best sequence of torch's own: fused AdamW, foreach clipping, foreach average."""
    average = [p.detach().clone() for p in params]
    weights = [p.detach() for p in params]
    lr = torch.tensor(LR, device=params[0].device)
    optimizer = torch.optim.AdamW(
        params, lr=lr, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True, capturable=True
    )

    def step() -> None:
        nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
        optimizer.step()
        torch._foreach_lerp_(average, weights, 1 - EMA)

    return Trained(params, step, lambda p: optimizer.state[p], average)


def official(params: list[nn.Parameter]) -> Trained:
    """What REPA's trainer does: foreach AdamW, clip_grad_norm_, an average tensor by tensor."""
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)

    def step() -> None:
        nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        with torch.no_grad():
            for a, p in zip(average, params):
                a.mul_(EMA).add_(p, alpha=1 - EMA)

    return Trained(params, step, lambda p: optimizer.state[p], average)


def apex(params: list[nn.Parameter]) -> Trained:
    """apex FusedAdam with torch's clipping and foreach average."""
    from apex.optimizers import FusedAdam

    average = [p.detach().clone() for p in params]
    optimizer = FusedAdam(params, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)

    def step() -> None:
        nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in params], 1 - EMA)

    return Trained(params, step, lambda p: optimizer.state[p], average)


PROVIDERS = {
    "cuda": lambda params: ours(params, "cuda"),
    "torch": lambda params: ours(params, "torch"),
    "stock": stock,
    "official": official,
    "apex": apex,
}


def plain(params: Sequence[torch.Tensor], dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """Parameters, moments and average after GATE_STEPS steps of the reference in `dtype`."""
    weights = [p.detach().to(dtype) for p in params]
    grads = [p.grad.to(dtype) for p in params]
    device = weights[0].device
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    average = [w.clone() for w in weights]
    steps = [torch.zeros((), dtype=dtype, device=device) for _ in weights]
    norm = sum_of_squares_reference(grads, device).sqrt()
    scale = (MAX_NORM / (norm + 1e-6)).clamp(max=1).to(dtype)
    zero = torch.zeros((), dtype=dtype, device=device)
    for _ in range(GATE_STEPS):
        adamw_ema_reference(
            weights, grads, first, second, steps, average, (), (), lr=zero + LR, grad_scale=scale,
            skip=zero, betas=BETAS, eps=EPS, weight_decay=DECAY, ema_decay=EMA,
        )  # fmt: skip
    return [weights, first, second, average]


def why_wrong(build: Callable, sizes: Sequence[tuple[int, ...]], device: torch.device) -> str:
    """What is outside the error budget after a few steps, "" if nothing is."""
    params = parameters(sizes, device)
    grads = [p.grad.clone() for p in params]
    trained = build(params)
    for _ in range(GATE_STEPS):
        for p, grad in zip(params, grads):
            p.grad = grad.clone()
        trained.step()
    fresh = parameters(sizes, device)
    results = [plain(fresh, dtype) for dtype in (torch.float64, torch.float32)]
    names = ("parameter", "exp_avg", "exp_avg_sq", "average")
    for i, p in enumerate(params):
        state = trained.moments(p)
        actual = (p.detach(), state["exp_avg"], state["exp_avg_sq"], trained.average[i])
        for name, tensor, oracle, working in zip(names, actual, *results):
            try:
                assert_within_budget(f"{name} {i}", tensor, oracle[i], working[i])
            except AssertionError as error:
                return str(error)
    return ""


def measure(name: str, sizes: Sequence[tuple[int, ...]], device: torch.device) -> dict:
    """A row: the figures of a provider, or why there are none."""
    count = sum(torch.Size(shape).numel() for shape in sizes)
    row = {"provider": name, "tensors": len(sizes), "parameters": count, **stamp()}
    try:
        wrong = why_wrong(PROVIDERS[name], sizes, device) if name in GATED else ""
        if wrong:
            return {**row, "status": "failed", "message": f"gate: {wrong}"}
        with timing.own_stream(device):
            trained = PROVIDERS[name](parameters(sizes, device))
            time = timing.measure([trained.step], device, timing.Effort(rounds=20, warmup=3))
        del trained
    except Exception as error:  # packages that are absent, or that raise anything
        return {**row, "status": "failed", "message": f"{type(error).__name__}: {error}"}
    nbytes = count * sum(BYTES.values())
    yardstick = timing.copy_time(nbytes, device, timing.QUICK)
    return {
        **row,
        "status": "ok",
        "ms_p20": time.p20,
        "ms_p50": time.p50,
        "ms_p80": time.p80,
        "method": time.method,
        "bytes": nbytes,
        "gb_per_s": nbytes / time.p50 / 1e6,
        "copy_ms_p50": yardstick.p50,
        "share_of_copy": yardstick.p50 / time.p50,
    }


def main() -> None:
    """Measure every provider and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--provider", nargs="*", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument(
        "--gate-only", action="store_true", help="a few odd tensors, no figures: for a sanitizer"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="file to append the rows to")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.gate_only:
        wrong = {name: why_wrong(PROVIDERS[name], SMALL, device) for name in arguments.provider}
        print(wrong)
        sys.exit(any(wrong.values()))
    for name in arguments.provider:
        row = measure(name, shapes(), device)
        print(json.dumps(row), flush=True)
        out = arguments.out or results_folder("optim", device.type) / "rows.jsonl"
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "a") as rows:
            rows.write(json.dumps(row) + "\n")
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
