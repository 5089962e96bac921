"""Who computes an op: plain torch, torch.compile, the kernels here, and other packages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.kernels import peers
from benchmarks.kernels.ops import BRANCH, Case
from repa_fast.backend.dispatch import why_not_triton
from repa_fast.kernels.attention import BACKENDS, Backend
from repa_fast.kernels.attention.backends import why_not as why_not_backend


@dataclass(frozen=True)
class Provider:
    """One implementation of an op.

    Attributes:
        name: in rows and reports.
        build: case -> a function of the case's tensors, by name.
        why_not: type of device -> why it cannot run there, or None.
        formula: what it computes, where that is not the op's reference.
        note: how it differs from the op, "" if it does not.
    """

    name: str
    build: Callable[[Case], Callable[..., Any]]
    why_not: Callable[[str], str | None] = lambda device: None
    formula: Callable[..., Any] | None = None
    note: str = ""


def compiled(case: Case) -> Callable[..., Any]:
    """torch.compile of the reference, as one graph, for the shapes it is called with."""
    # A backward pass that reuses the memory of what was saved for it cannot run twice.
    torch._functorch.config.donated_buffer = False
    torch.compiler.reset()  # one function at many shapes: not to run out of recompilations
    plain = case.plain or (lambda **tensors: case.reference(**tensors))
    return torch.compile(plain, fullgraph=True, dynamic=False)


def ours(case: Case) -> Callable[..., Any]:
    """The kernels of this project."""
    return partial(case.call, **case.options, implementation="triton")


def _why_not_ours(device: str) -> str | None:
    return why_not_triton(device) or None


def _backend(backend: Backend) -> Provider:
    return Provider(
        backend.name,
        lambda case: partial(case.call, backend=backend.name),
        lambda device: why_not_backend(backend, device, BRANCH) or backend.probe(),
    )


EAGER = Provider("eager", lambda case: case.reference)
COMPILE = Provider("compile", compiled)
OURS = Provider("ours", ours, _why_not_ours)

_PEERS = (
    Provider(
        "liger",
        lambda case: peers.liger(),
        lambda device: peers.needs_cuda(
            device, "liger_kernel.transformers.modulated_rms_norm", "LigerModulatedRMSNorm"
        ),
        peers.rms_formula,
        note="a neighbour: RMS norm, no mean",
    ),
    Provider(
        "quack",
        lambda case: peers.quack(),
        lambda device: peers.needs_cuda(device, "quack.rmsnorm", "layernorm_fwd", "layernorm_bwd"),
        note="its LayerNorm, modulated by torch",
    ),
    Provider(
        "cudnn",
        lambda case: peers.cudnn(),
        lambda device: peers.needs_cuda(device, "cudnn", "pygraph", "norm_forward_phase"),
        note="adalayernorm of cuDNN's frontend",
    ),
    Provider(
        "apex",
        lambda case: peers.apex(),
        lambda device: peers.needs_cuda(
            device, "apex.normalization.fused_layer_norm", "fused_layer_norm"
        ),
        note="its fused_layer_norm, modulated by torch; FastLayerNorm lacks D = 1152",
    ),
)


def providers(op: str) -> Mapping[str, Provider]:
    """Providers of an op by name; those of attention are the backends of its table."""
    if op == "attention":
        table = (COMPILE, *map(_backend, BACKENDS.values()))
    else:
        table = (OURS, COMPILE, EAGER, *(_PEERS if op == "adaln" else ()))
    return {provider.name: provider for provider in table}
