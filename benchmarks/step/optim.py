"""The optimizer's step on SiT-XL/2's tensors: `python -m benchmarks.step.optim`.

A step is the gradient norm, clipping, AdamW and the EMA. Ours is first compared with
the reference on the same tensors, and gets no figure where it is wrong.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from benchmarks.harness import timing
from benchmarks.harness.environment import parser, results_folder, stamp
from benchmarks.harness.rows import append
from repa_fast.kernels.adamw_ema.reference import adamw_ema_reference, sum_of_squares_reference
from repa_fast.models.sit import SiT, size
from repa_fast.testing import assert_within_budget
from repa_fast.train.optim import AdamWEMA, clip_factor

ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
MAX_NORM, EMA = 1.0, 0.9
SMALL = ((3,), (0,), (8192,), (8193,), (72, 72), (5, 1001))
BYTES = {  # per parameter in fp32: what one pass and a reading for the norm have to move
    "read": 4 + 5 * 4,  # norm: gradient; then gradient, parameter, two moments, EMA
    "written": 4 * 4,  # parameter, two moments, EMA
}
LEAF_BYTES = {"read": 2 + 2 + 4 * 4, "written": 4 * 4 + 2}  # gradients and leaves in bf16
GATE_STEPS = 3
GATED = ("cuda",)  # the others are torch's and apex's code, rounded in their own way


def shapes() -> list[tuple[int, ...]]:
    """Return those of SiT-XL/2's trained parameters, with a projector to 768 columns."""
    with torch.device("meta"):
        model = SiT(**size("SiT-XL/2"))
    return [tuple(p.shape) for p in model.parameters() if p.requires_grad]


def parameters(sizes: Sequence[tuple[int, ...]], device: torch.device) -> list[nn.Parameter]:
    """Draw parameters and gradients, whose norm is far above MAX_NORM."""
    generator = torch.Generator(device).manual_seed(0)
    found = [
        nn.Parameter(torch.randn(shape, generator=generator, device=device)) for shape in sizes
    ]
    for p in found:
        p.grad = torch.randn(p.shape, generator=generator, device=device)
    return found


@dataclass(frozen=True)
class Trained:
    """A step that a provider makes, the optimizer's state by parameter, and the EMA."""

    step: Callable[[], None]
    moments: Callable[[nn.Parameter], dict[str, torch.Tensor]]
    average: list[torch.Tensor]


def ours(params: list[nn.Parameter], implementation: str) -> Trained:
    """Take steps of AdamWEMA."""
    average = [p.detach().clone() for p in params]
    optimizer = AdamWEMA(params, [average], [EMA], **ADAMW, implementation=implementation)

    def step() -> None:
        optimizer.step(grad_scale=clip_factor(optimizer.gradient_norm(), MAX_NORM))

    return Trained(step, lambda p: optimizer.state[p], average)


def with_leaves(params: list[nn.Parameter]) -> Trained:
    """Take steps of AdamWEMA as a bf16 run does, with gradients at bf16 leaves."""
    masters = [p.detach() for p in params]
    average = [master.clone() for master in masters]
    leaves = {master: nn.Parameter(master.bfloat16()) for master in masters}
    for p, leaf in zip(params, leaves.values()):
        leaf.grad, p.grad = p.grad.bfloat16(), None
    optimizer = AdamWEMA(masters, [average], [EMA], leaves, **ADAMW, implementation="cuda")

    def step() -> None:
        optimizer.step(grad_scale=clip_factor(optimizer.gradient_norm(), MAX_NORM))

    return Trained(step, lambda p: {}, average)


def others(
    params: list[nn.Parameter], optimizer: torch.optim.Optimizer, one_by_one: bool = False
) -> Trained:
    """Take steps of another optimizer, with torch's clipping and a foreach or one-by-one EMA."""
    average, weights = [p.detach().clone() for p in params], [p.detach() for p in params]

    def step() -> None:
        nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        if not one_by_one:
            torch._foreach_lerp_(average, weights, 1 - EMA)
            return
        for a, w in zip(average, weights):
            a.mul_(EMA).add_(w, alpha=1 - EMA)

    return Trained(step, lambda p: optimizer.state[p], average)


def official(params: list[nn.Parameter]) -> Trained:
    """Do what REPA's trainer does: foreach AdamW, clip_grad_norm_, an EMA tensor by tensor."""
    return others(params, torch.optim.AdamW(params, **ADAMW), one_by_one=True)


def stock(params: list[nn.Parameter]) -> Trained:
    """Take the best sequence of torch's own: fused AdamW, foreach clipping, foreach EMA."""
    options = ADAMW | {"lr": torch.tensor(ADAMW["lr"], device=params[0].device)}
    return others(params, torch.optim.AdamW(params, **options, fused=True, capturable=True))


def apex(params: list[nn.Parameter]) -> Trained:
    """Take steps of apex FusedAdam."""
    from apex.optimizers import FusedAdam

    return others(params, FusedAdam(params, **ADAMW))


PROVIDERS = {name: partial(ours, implementation=name) for name in ("cuda", "torch")}
PROVIDERS |= {"leaves": with_leaves, "stock": stock, "official": official, "apex": apex}


def plain(params: Sequence[torch.Tensor], dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """Return parameters, moments and EMA after GATE_STEPS steps of the reference in `dtype`."""
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
            weights, grads, first, second, steps, average, (), grad_scale=scale, skip=zero,
            ema_rate=zero + (1 - EMA), **ADAMW | {"lr": zero + ADAMW["lr"]},
        )  # fmt: skip
    return [weights, first, second, average]


def why_wrong(build: Callable, sizes: Sequence[tuple[int, ...]], device: torch.device) -> str:
    """Return what is outside the error budget after a few steps, or ""."""
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
    """Return a row: a provider's figures, or why there are none."""
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
    nbytes = count * sum((LEAF_BYTES if name == "leaves" else BYTES).values())
    yardstick = timing.copy_time(nbytes, device, timing.QUICK)
    row |= {"status": "ok", **time.figures, "bytes": nbytes}
    row |= {"gb_per_s": nbytes / time.p50 / 1e6, "copy_ms_p50": yardstick.p50}
    return row | {"share_of_copy": yardstick.p50 / time.p50}


def main() -> None:
    """Measure every provider and append the rows."""
    flags = parser(__doc__.splitlines()[0], "file to append the rows to")
    flags.add_argument("--provider", nargs="*", choices=PROVIDERS, default=list(PROVIDERS))
    text = "a few odd tensors, no figures: for a sanitizer"
    flags.add_argument("--gate-only", action="store_true", help=text)
    arguments = flags.parse_args()
    device = torch.device(arguments.device)
    if arguments.gate_only and "leaves" in arguments.provider:
        flags.error("--gate-only: leaves round gradients, expected --provider with the others")
    if arguments.gate_only:
        wrong = {name: why_wrong(PROVIDERS[name], SMALL, device) for name in arguments.provider}
        print(wrong)
        sys.exit(any(wrong.values()))
    out = arguments.out or results_folder("optim", device.type) / "rows.jsonl"
    for name in arguments.provider:
        row = measure(name, shapes(), device)
        print(json.dumps(row), flush=True)
        append(out, row)
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
