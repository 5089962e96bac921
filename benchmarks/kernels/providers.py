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
    """One implementation of an op."""

    name: str  # in rows and reports
    build: Callable[[Case], Callable[..., Any]]  # case -> a function of its tensors, by name
    why_not: Callable[[str], str | None] = lambda device: None  # why it cannot run there
    formula: Callable[..., Any] | None = None  # what it computes, if not the op's reference
    note: str = ""  # how it differs from the op


def compiled(case: Case) -> Callable[..., Any]:
    """Compile the reference, as one graph, for the shapes it is called with."""
    import torch._functorch.config as functorch

    # A backward pass that reuses the memory of what was saved for it cannot run twice.
    functorch.donated_buffer = False
    torch.compiler.reset()  # one function at many shapes: not to run out of recompilations
    plain = case.plain or (lambda **tensors: case.reference(**tensors))
    return torch.compile(plain, fullgraph=True, dynamic=False)


def ours(case: Case) -> Callable[..., Any]:
    """Return this project's kernels."""
    return partial(case.call, **case.options, implementation="triton")


def _backend(backend: Backend) -> Provider:
    """Return one of attention's backends."""
    return Provider(
        backend.name,
        lambda case: partial(case.call, backend=backend.name),
        lambda device: why_not_backend(backend, device, BRANCH) or backend.probe(),
        note="" if backend.packs else "its gradients stacked by torch",
    )


def _peer(
    build: Callable, module: str, *names: str, formula: Callable | None = None, note: str
) -> Provider:
    """Return another package's kernel, which needs these names of one of its modules."""
    return Provider(
        build.__name__,
        lambda case: build(),
        lambda device: peers.why_not(device, module, *names),
        formula,
        note,
    )


EAGER = Provider("eager", lambda case: case.reference)
COMPILE = Provider("compile", compiled)
OURS = Provider("ours", ours, lambda device: why_not_triton(device) or None)

_PEERS = (
    _peer(
        *(peers.liger, "liger_kernel.transformers.modulated_rms_norm", "LigerModulatedRMSNorm"),
        formula=peers.rms_formula,
        note="a neighbour: RMS norm, no mean",
    ),
    _peer(
        *(peers.quack, "quack.rmsnorm", "layernorm_fwd", "layernorm_bwd"),
        note="its LayerNorm, modulated by torch",
    ),
    _peer(
        *(peers.cudnn, "cudnn", "pygraph", "norm_forward_phase"),
        note="adalayernorm of cuDNN's frontend",
    ),
    _peer(
        *(peers.apex, "apex.normalization.fused_layer_norm", "fused_layer_norm"),
        note="its fused_layer_norm, modulated by torch; FastLayerNorm lacks D = 1152",
    ),
)


def providers(op: str) -> Mapping[str, Provider]:
    """Return an op's providers by name; those of attention are its backends."""
    if op == "attention":
        table = (COMPILE, *map(_backend, BACKENDS.values()))
    else:
        table = (OURS, COMPILE, EAGER, *(_PEERS if op == "adaln" else ()))
    return {provider.name: provider for provider in table}
