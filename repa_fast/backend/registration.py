"""Kernels as torch operators, so that torch.compile, FSDP and checkpointing see through them."""

import functools
import importlib
from collections.abc import Callable

import torch
from torch._subclasses.functional_tensor import FunctionalTensorMode

from repa_fast.backend.launch import tracing

_library = torch.library.Library("repa_fast", "FRAGMENT")


def define(schema: str, package: str, run: str, fake: Callable) -> torch._ops.OpOverload:
    """Register torch.ops.repa_fast.<name>, without autograd, unless it is already there.

    An op's module can exist twice, as repa_fast.kernels.<op> and, imported from the root of a
    checkout, as kernels.<op>; the operator is the same.

    Args:
        schema: "name(Tensor x, ...) -> Tensor", outputs new tensors.
        package, run: the op's package and the name of a function in its triton_kernels.py, which
            is imported at the first call; called with real tensors of any device.
        fake: called with fake ones; returns empty outputs of the right shape, dtype, strides.
    """
    name = schema.partition("(")[0]
    if not hasattr(torch.ops.repa_fast, name):
        _library.define(schema)
        late = _imported_late(package, run)
        _library.impl(name, late, "CompositeExplicitAutograd")
        torch.library.register_fake(f"repa_fast::{name}", fake, lib=_library)
        _show_kernels(name, late)
    return getattr(torch.ops.repa_fast, name).default


def _show_kernels(name: str, run: Callable) -> None:
    """Let torch.compile see the launches of an operator, on a GPU: it then makes them itself.

    A compiled graph launches a kernel in a few microseconds of host time, an operator in Python
    takes ten times as long. As torch.library.triton_op does it, without importing Triton here.
    """

    def traced(mode, op, types, args, kwargs):
        if not all(tensor.is_cuda for tensor in args if isinstance(tensor, torch.Tensor)):
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode, tracing():
            return run(*args)

    operator = f"repa_fast::{name}"
    torch.library.register_torch_dispatch(operator, FunctionalTensorMode, traced, lib=_library)


def first_derivative_only(backward: Callable) -> Callable:
    """Let the backward of an autograd.Function over operators without autograd raise when it must.

    Under create_graph a second derivative would silently lack terms.
    """

    @functools.wraps(backward)
    def checked(ctx, *gradients):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the kernels cannot be differentiated twice (create_graph=True): "
                'use implementation="reference" or REPA_FAST_KERNELS=reference'
            )
        return backward(ctx, *gradients)

    return checked


def _imported_late(package: str, name: str) -> Callable:
    @functools.cache
    def function() -> Callable:
        return getattr(importlib.import_module(".triton_kernels", package), name)

    return lambda *args: function()(*args)
