"""Ops evaluated on plain tensors, here or in a process of their own under Triton's interpreter."""

import functools
import io

import numpy as np
import torch
import torch.utils._device

from repa_fast import ops

# torch caches the functions that `with torch.device(...)` redirects; cached while patched, they
# would stay patched for the rest of the process.
torch.utils._device._device_constructors()

ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
)


def nan_filled(allocate):
    """`allocate`, its memory reading as NaN: an element that no kernel wrote is noticed."""

    @functools.wraps(allocate)
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() or tensor.is_complex():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return wrapper


def evaluate(op, arguments, upstream, options):
    """(outputs of ops.<op>, gradients).

    arguments: {name: tensor or plain value}; gradients are those of the floating tensors in it, in
    its order, for the upstream gradients `upstream` (None where an output was not used), or
    none if upstream is None. An argument without influence has the gradient None.
    """
    leaves = {
        name: value.detach().requires_grad_(upstream is not None)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }
    outputs = getattr(ops, op)(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if upstream is None:
        return outputs, ()
    wanted = [v for v in leaves.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    used = [(out, up) for out, up in zip(outputs, upstream) if up is not None]
    used_outputs, used_upstream = zip(*used)
    gradients = torch.autograd.grad(used_outputs, wanted, used_upstream, allow_unused=True)
    return tuple(out.detach() for out in outputs), gradients


def pack(values):
    """Bytes that keep strides and shared storage."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


def unpack(data):
    return torch.load(io.BytesIO(data), weights_only=False)


def poison_memory():
    """Unwritten memory reads as NaN for the rest of this process."""
    torch.set_num_threads(1)
    for owner, name in ALLOCATORS:
        setattr(owner, name, nan_filled(getattr(owner, name)))


def round_to_nearest():
    """Round to bf16 as a GPU does; Triton's interpreter cuts the lower half of the fp32 off."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl
    if cast.__name__ == "nearest":
        return

    def nearest(self, source, dtype):
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, dtype)
        rounded = torch.from_numpy(np.array(source.data)).bfloat16()
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), dtype.scalar)

    InterpreterBuilder.cast_impl = nearest


def evaluate_packed(data):
    return pack(evaluate(*unpack(data)))


def call_packed(data):
    """Any importable function in this process."""
    function, arguments = unpack(data)
    return pack(function(*arguments))
