"""What a part of the step launches on an H100 that is not there, and the bytes that it moves.

For the pretended card (benchmarks/gpu/pretended) and fake tensors. Inductor traces, differentiates,
fuses and writes its code for sm_90; no kernel of it is compiled and nothing runs.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = ("elementwise", "stack", "casts", "attention", "matmuls")
"""Elementwise kernels, ours and Inductor's; copies of what attention returns; changes of dtype
alone; attention and matmuls, whose bytes are those of their operands."""
CALL = re.compile(
    r"^\s*(?:\w+ = )?(\w+(?=\.run\()|(?:extern_kernels|torch\.ops)[\w.]+(?=\())", re.M
)
CAST = re.compile(r"triton_poi_fused(_(_to_copy|t|view|_unsafe_view|permute|transpose))+_\d+")
DENSE = ("mm", "addmm")
MATMULS = (*DENSE, "bmm", "baddbmm", "convolution", "convolution_backward")
ALLOCATE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


@dataclass(frozen=True)
class Launch:
    """A launch site.

    nbytes: read and written, every tensor once.
    matmul: (m, n, k, layout) of a matmul; in its layout "T" is a transposed operand.
    """

    name: str
    kind: str
    nbytes: int
    matmul: tuple[int, int, int, str] | None = None


class NothingRuns(Exception):
    """Raised in the place of compiled code."""


def compiled(module: nn.Module, *inputs: Tensor) -> dict[str, list[Launch]]:
    """Return the launches of a module's compiled "forward", and "backward" where it has one.

    Inputs and weights are on "cuda", and may be fake.
    """
    import torch._functorch.config as functorch
    from torch._inductor import config, graph

    found: dict[str, list[Launch]] = {}

    def stop(lowered) -> ModuleType:
        code = lowered.codegen()[0].value.partition("def call(")[2]
        nodes = [node for node in lowered.scheduler.nodes if _launches(node)]
        sites = zip(CALL.findall(code), nodes, strict=True)
        found["backward" if lowered.is_backward else "forward"] = [_site(*s) for s in sites]
        module = ModuleType("nothing")
        module.__file__, module.key, module.call = "", "", _run_nothing
        return module

    torch.compiler.reset()  # or a second batch would be compiled as any batch
    module.compile(fullgraph=True)
    with (
        mock.patch.object(graph.GraphLowering, "compile_to_module", stop),
        config.patch(force_disable_caches=True, compile_threads=1),
        functorch.patch(force_non_lazy_backward_lowering=True),
        suppress(NothingRuns),
    ):
        module(*inputs)
    return found


def _run_nothing(_) -> None:
    raise NothingRuns


def _launches(node) -> bool:
    from torch._inductor import ir
    from torch._inductor.scheduler import NopKernelSchedulerNode

    return not (isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput))


def _site(name: str, node) -> Launch:
    from torch._inductor import ir

    if isinstance(node.node, ir.UserDefinedTritonKernel):
        # what it writes is among what it is said to read, too
        return Launch(name, "elementwise", node.get_read_buffer_sizes())
    nbytes = node.get_read_write_buffers_sizes()
    if name.startswith("extern_kernels."):
        a, b = ((t.get_size(), t.get_stride()) for t in node.node.inputs[-2:])
        return Launch(name, "matmuls", nbytes, _matmul(a, b))
    if "attention" in name:
        return Launch(name, "attention", nbytes)
    if CAST.fullmatch(name):
        return Launch(name, "casts", nbytes)
    buffers = (node.scheduler.name_to_buf.get(dep.name) for dep in node.read_writes.reads)
    of_attention = any(b is not None and isinstance(b.node, ir.MultiOutput) for b in buffers)
    moves = of_attention and name.startswith("triton_poi")
    return Launch(name, "stack" if moves else "elementwise", nbytes)


def _matmul(a: tuple, b: tuple) -> tuple[int, int, int, str] | None:
    """Return Launch.matmul of two operands, (size, strides) each; None for a convolution's."""
    if len(a[0]) != 2 or len(b[0]) != 2:
        return None
    layout = "".join("N" if int(strides[1]) == 1 else "T" for _, strides in (a, b))
    return int(a[0][0]), int(b[0][1]), int(a[0][1]), layout


class Eager(TorchDispatchMode):
    """Collects the launches of operators that run one by one, on fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        name = function._schema.name.partition("::")[2]
        read, written = (
            {t.untyped_storage()._cdata: t for t in tree_leaves(tree) if isinstance(t, Tensor)}
            for tree in ((arguments, options), out)
        )
        new = {key: tensor for key, tensor in written.items() if key not in read}
        runs = (new and name not in ALLOCATE) or function._schema.is_mutable
        tensors = [*read.values(), *new.values()]
        if runs and any(tensor.is_cuda for tensor in tensors):
            operands = [(t.shape, t.stride()) for t in arguments[-2:]] if name in DENSE else []
            nbytes, matmul = sum(map(_accessed, tensors)), _matmul(*operands) if operands else None
            self.launches.append(Launch(name, _kind(name), nbytes, matmul))
        return out


def _kind(name: str) -> str:
    if name == "_to_copy":
        return "casts"
    if "attention" in name:
        return "attention"
    return "matmuls" if name in MATMULS else "elementwise"


def _accessed(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements; of those that a broadcast repeats once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride()) if stride)
    return torch.Size(sizes).numel() * tensor.element_size()
