"""What the tests of kernels share: layouts, and checks that run in the interpreter's process."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from repa_fast import ops
from repa_fast.backend.dispatch import use_kernels
from repa_fast.models.sit import SiTBlock
from repa_fast.testing import seeded
from tests.kernels.evaluate import evaluate, to

# How a (B, N, D) tensor can lie in memory. Expanded ones have other values.
TOKENS = {
    "transposed": lambda v: v.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda v: torch.cat([v[:, :1], v], dim=1)[:, 1:],
    "every second column": lambda v: v.repeat_interleave(2, dim=-1)[..., ::2],
    "expanded over tokens": lambda v: v[:, :1].expand_as(v),
    "expanded over samples": lambda v: v[:1].expand_as(v),
    "one number": lambda v: v[:1, :1, :1].expand_as(v),
}
# How a (B, D) tensor can.
VECTORS = {
    "contiguous": torch.Tensor.contiguous,
    "every second column": lambda v: v.repeat_interleave(2, dim=-1)[:, ::2],
    "transposed": lambda v: v.t().contiguous().t(),
    "expanded over samples": lambda v: v[:1].expand_as(v),
    "expanded over columns": lambda v: v[:, :1].expand_as(v),
}


def modified(op, arguments, upstream, options, device):
    """Names of the tensors that an evaluation with its backward pass changes."""
    arguments, upstream = to(device, [arguments, upstream])
    tensors = arguments | dict(enumerate(upstream or ()))
    tensors = {name: v for name, v in tensors.items() if isinstance(v, torch.Tensor)}
    before = {name: v.clone() for name, v in tensors.items()}
    evaluate(op, arguments, upstream, options)
    return [name for name, v in tensors.items() if not torch.equal(v, before[name])]


def far_vectors(op, arguments, names, upstream):
    """Results with vectors of 16 bits whose rows lie 2^31 elements apart, and with near ones.

    None where the address space is not to be had; the pages between the rows are never touched.
    """
    width = arguments[names[0]].shape[-1]
    stride = 2**31 + 16
    try:
        storage = torch.empty(stride + len(names) * width, dtype=torch.int16)
    except RuntimeError:
        return None
    far = {}
    for number, name in enumerate(names):
        near = arguments[name]
        far[name] = torch.as_strided(
            storage.view(near.dtype), near.shape, (stride, 1), number * width
        ).copy_(near)
    options = {"implementation": "triton"}
    results = [evaluate(op, arguments | more, upstream, options) for more in (far, {})]
    return [(*outputs, *gradients) for outputs, gradients in results]


class Recorder(TorchDispatchMode):
    """Notes a call of each of the kernels' operators, and of each set of what is None in it."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "repa_fast":
            self.calls[function, *(value is None for value in args)] = args
        return function(*args, **(kwargs or {}))


def opchecked(op, cases):
    """[{test: result}] of torch.library.opcheck, of what evaluations call."""
    with Recorder() as recorder:
        for arguments, upstream in cases:
            evaluate(op, arguments, upstream, {"implementation": "triton"})
    return [torch.library.opcheck(call[0], args) for call, args in recorder.calls.items()]


def block_results(how, implementation):
    """Outputs of a SiT block and gradients of its inputs and parameters."""
    use_kernels(implementation)
    try:
        torch.manual_seed(0)
        block = SiTBlock(24, 2, 2.0, qk_norm=False, fused_attn=True)
        x, branch = (seeded((2, 5, 24), seed=seed).requires_grad_() for seed in (1, 2))
        gate = seeded((2, 24), seed=3).requires_grad_()
        modulation = seeded((2, 6 * 24), seed=4, std=0.5).requires_grad_()
        leaves = (x, branch, gate, modulation)
        if how == "compiled":
            outputs = torch.compile(block, fullgraph=True, backend="aot_eager")(*leaves)
        elif how == "checkpointed":
            outputs = checkpoint(block, *leaves, use_reentrant=False)
        elif how == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                outputs = block(x, *(v.bfloat16() for v in leaves[1:]))
        elif how == "fp64":
            outputs = block.double()(x.double(), *(v.bfloat16().double() for v in leaves[1:]))
        else:
            outputs = block(*leaves)
        upstream = [
            seeded(v.shape, seed=5 + i, dtype=torch.bfloat16).to(v.dtype)
            for i, v in enumerate(outputs)
        ]
        parameters = [p for n, p in block.named_parameters() if not n.startswith("adaLN")]
        gradients = torch.autograd.grad(outputs, (*leaves, *parameters), upstream)
        return [v.detach() for v in outputs], list(gradients)
    finally:
        use_kernels(None)


def second_derivative(op, arguments, linear):
    """The error of differentiating twice, or "" without one.

    With `linear` the upstream gradient does not depend on the arguments, so that only the op itself
    makes the first gradient a function of them.
    """
    leaves = {name: v.requires_grad_() for name, v in arguments.items()}
    outputs = getattr(ops, op)(**leaves, implementation="triton")
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((out if linear else out.square()).sum() for out in outputs)
    wanted = list(leaves.values())
    try:
        gradients = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
        sum((g.square().sum() for g in gradients if g is not None), loss).backward()
    except RuntimeError as error:
        return str(error)
    return ""


def swept(kernel):
    """Statuses and messages of every launch parameter of a kernel, at a tiny shape."""
    from benchmarks.harness.timing import Effort
    from benchmarks.kernels import tune
    from benchmarks.kernels.measure import Bench
    from benchmarks.kernels.ops import tiny

    bench = Bench(torch.device("cpu"), Effort(graph_ms=0, rounds=1, warmup=0))
    points = tune.points(kernel)[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "points", lambda _: points)
        rows = list(tune.sweep(bench, kernel, tiny(tune.KERNELS[kernel][0]), float("inf")))
    return [(row["status"], row.get("message", "")) for row in rows]
