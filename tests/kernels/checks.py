"""What the tests of kernels share: layouts, and checks that run in the interpreter's process."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from repa_fast import ops
from repa_fast.backend.dispatch import use_kernels
from repa_fast.diffusion.path import PATHS
from repa_fast.models.sit import SiTBlock
from repa_fast.testing import modulation_chunks, seeded
from tests.kernels.conftest import to
from tests.kernels.evaluate import evaluate

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
LOW = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float16, torch.float16: torch.float32}
KERNELS = ("interpreter", pytest.param("triton", marks=pytest.mark.gpu))
EVERYWHERE = ("reference", *KERNELS)


def caller(request, implementation):
    """call(function, ..., options, device) where that implementation of `run` runs."""
    if implementation == "reference":
        return lambda f, *arguments: f(*arguments, {"implementation": "reference"}, "cpu")
    options = {"implementation": "triton"}
    if implementation == "triton":
        return lambda f, *arguments: f(*arguments, options, "cuda")
    interpreter = request.getfixturevalue("interpreter")
    return lambda f, *arguments: interpreter(f, *arguments, options, "cpu")


def modified(op, arguments, upstream, options, device):
    """Names of the tensors that an evaluation with its backward pass changes."""
    arguments, upstream = to(device, arguments), dict(enumerate(to(device, upstream)))
    before = [v.clone() for v in (*arguments.values(), *upstream.values())]
    evaluate(op, arguments, list(upstream.values()), options)
    after = (*arguments.values(), *upstream.values())
    names = (*arguments, *upstream)
    return [name for name, a, b in zip(names, after, before) if not torch.equal(a, b)]


def modulation_gradient(op, arguments, modulation, chunks, upstream, options, device):
    """Gradient of a (B, 6 D) tensor, of which `chunks` {name: number} are arguments."""
    modulation = modulation.detach().clone().to(device).requires_grad_()
    parts = modulation.chunk(6, dim=-1)
    vectors = {name: parts[number] for name, number in chunks.items()}
    outputs = getattr(ops, op)(**to(device, arguments), **vectors, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, to(device, list(upstream)))
    return modulation.grad.cpu()


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


def step(tensors, plain, path, options, device):
    """Results of euler_maruyama_step, and the names of the tensors that it changed."""
    tensors = to(device, tensors)
    before = {k: v.clone() for k, v in tensors.items() if v is not None}
    with torch.no_grad():
        results = ops.euler_maruyama_step(**tensors, **plain, path=PATHS[path], **options)
    changed = [name for name, value in before.items() if not torch.equal(value, tensors[name])]
    return [v.cpu() for v in results], changed


def raw_arguments(name, shape=(2, 5, 24), dtype=torch.bfloat16):
    """Tensors without gradient for torch.ops.repa_fast.<name>, an fp32 stream beside `dtype`."""
    x = seeded(shape, seed=1)
    branch, dy = (seeded(shape, seed=seed, dtype=dtype) for seed in (2, 3))
    gate, shift, scale = modulation_chunks(shape[0], shape[2], seed=4, dtype=dtype)[:3]
    statistics = torch.stack([x.mean(-1), x.var(-1, correction=0).rsqrt()], dim=-1)
    patches = torch.stack([seeded(shape[:2], seed=5).tanh()] * 4, dim=-1).abs()
    index = torch.arange(shape[0]) + 2**33
    factors = [0.9, -0.1, 0.3]
    adaln = (x, branch, gate, shift, scale)
    return {
        "adaln_forward": [(x, shift, scale, 1e-6, dtype)],
        "adaln_backward": [(dy, x, scale, statistics, dtype)],
        "gate_residual_forward": [(x, branch, gate)],
        "gate_residual_backward": [(x, branch, gate)],
        "gate_residual_adaln_forward": [(*adaln, 1e-6, torch.float32)],
        "gate_residual_adaln_backward": [
            (dy, dx, x, branch, gate, scale, statistics, torch.float32) for dx in (x + 1, None)
        ],
        "align_loss_forward": [(branch, x, 1e-12)],
        "align_loss_backward": [(x[:, 0, 0].contiguous(), branch, x, patches)],
        "euler_maruyama_step": [
            (x, branch, dy, x + 1, None, factors, 1.5, 0, 0, dtype),
            (x, branch, None, None, index, factors, 1.0, 2**40, 3, torch.float32),
        ],
    }[name]


def opchecked(name):
    operator = getattr(torch.ops.repa_fast, name).default
    return [torch.library.opcheck(operator, args) for args in raw_arguments(name)]


def opchecked_with_gradients(op, arguments):
    """torch.library.opcheck's comparison of a compiled call and its gradients with eager."""
    from torch.testing._internal.optests import aot_autograd_check

    leaves = [v.requires_grad_() for v in arguments.values()]
    call = functools.partial(getattr(ops, op), implementation="triton")
    for dynamic in (False, True):
        aot_autograd_check(call, tuple(leaves), {}, dynamic, check_gradients=True)


def compiled_and_eager(op, arguments, upstream):
    """Outputs and gradients of the kernels, through torch.compile as one graph and without.

    Where an entry of `upstream` is None that output is not used.
    """
    results = []
    for call in (torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager"), None):
        call = call or getattr(ops, op)
        leaves = {k: v.detach().clone().requires_grad_() for k, v in arguments.items()}
        outputs = call(**leaves, implementation="triton")
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = list(leaves.values())
        used = [pair for pair in zip(outputs, upstream) if pair[1] is not None]
        loss = sum((out * up).sum() for out, up in used)
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        results.append([*(v.detach() for v in outputs), *gradients])
    return results


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
