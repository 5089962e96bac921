"""Every op, eager and under torch.compile, forward and forward with backward.

On a GPU at SiT-XL/2's shapes and in bf16 with an fp32 residual stream; on a CPU at a small shape in
fp32, to see that it runs. `make bench`, or `pytest benchmarks/kernels --benchmark-only`.
"""

from collections.abc import Callable

import pytest
import torch

from benchmarks.environment import stamp
from repa_fast import ops

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
SHAPES = [(32, 256, 1152), (256, 256, 1152)] if CUDA else [(4, 64, 384)]


def tokens(shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)


def vectors(shape: tuple[int, int, int], count: int) -> list[torch.Tensor]:
    """`count` strided (B, D) chunks of one tensor, as a block's modulation gives them."""
    batch, _, width = shape
    modulation = torch.randn(batch, 6 * width, device=DEVICE, dtype=DTYPE, requires_grad=True)
    return list(modulation.chunk(6, dim=-1)[:count])


def inputs(name: str, shape: tuple[int, int, int]) -> list[torch.Tensor]:
    residual, branch = tokens(shape, torch.float32), tokens(shape, DTYPE)
    return {
        "adaln": lambda: [residual, *vectors(shape, 2)],
        "gate_residual": lambda: [residual, branch, *vectors(shape, 1)],
        "gate_residual_adaln": lambda: [residual, branch, *vectors(shape, 3)],
        "align_loss": lambda: [branch, tokens(shape, DTYPE).detach()],
    }[name]()


def forward(op: Callable, arguments: list[torch.Tensor]) -> None:
    with torch.no_grad():
        op(*arguments)
    synchronise()


def forward_backward(op: Callable, arguments: list[torch.Tensor]) -> None:
    outputs = op(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [argument for argument in arguments if argument.requires_grad]
    torch.autograd.grad(outputs, wanted, [torch.ones_like(output) for output in outputs])
    synchronise()


def synchronise() -> None:
    if CUDA:
        torch.cuda.synchronize()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("work", [forward, forward_backward], ids=lambda work: work.__name__)
@pytest.mark.parametrize("provider", ["eager", "compile"])
@pytest.mark.parametrize("name", ops.__all__)
def bench_op(benchmark, name, provider, work, shape):
    op = getattr(ops, name)
    if provider == "compile":
        op = torch.compile(op, fullgraph=True)
    arguments = inputs(name, shape)
    work(op, arguments)  # compiles
    benchmark.group = f"{name} {work.__name__} {'x'.join(map(str, shape))}"
    benchmark.extra_info.update(stamp(), dtype=str(DTYPE), shape=list(shape))
    benchmark(work, op, arguments)
