"""Ops evaluated on plain tensors, here or in a process of their own under Triton's interpreter."""

import functools
import io

import numpy as np
import torch
import torch.utils._device

from repa_fast import ops
from repa_fast.diffusion.path import PATHS

# torch caches the functions that `with torch.device(...)` redirects; cached while patched, they
# would stay patched for the rest of the process.
torch.utils._device._device_constructors()

ALLOCATORS = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
ALLOCATORS += [(torch.Tensor, "new_empty")]


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


def evaluate(op, arguments, upstream, options, compiled=""):
    """(outputs of ops.<op>, gradients).

    arguments: {name: tensor or plain value}; gradients are those of the floating tensors in it, in
    its order, for the upstream gradients `upstream` (None where an output was not used), or
    none if upstream is None. An argument without influence has the gradient None.
    compiled: through torch.compile, as one graph of "static" or "dynamic" shapes.
    """
    function = getattr(ops, op)
    if compiled:
        graph = {"fullgraph": True, "dynamic": compiled == "dynamic"}
        function = torch.compile(function, backend="aot_eager", **graph)
    if "path" in arguments:  # by name, since it cannot be pickled
        arguments = arguments | {"path": PATHS[arguments["path"]]}
    leaves = {
        name: value.detach().requires_grad_(upstream is not None)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }
    outputs = function(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if upstream is None:
        return outputs, ()
    wanted = [v for v in leaves.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    used, given = zip(*((out, up) for out, up in zip(outputs, upstream) if up is not None))
    gradients = torch.autograd.grad(used, wanted, given, allow_unused=True)
    return tuple(out.detach() for out in outputs), gradients


def pack(values):
    """Bytes that keep strides and shared storage."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


def unpack(data):
    return torch.load(io.BytesIO(data), weights_only=False)


def poison_memory(setattr=setattr):
    """Unwritten memory reads as NaN, with no other `setattr` for the rest of this process."""
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


def call_packed(data):
    """Any importable function in this process."""
    function, *arguments = unpack(data)
    return pack(function(*arguments))


def to(device, values):
    """Tensors in nested tuples, lists and dicts on `device`, with their strides."""
    if isinstance(values, torch.Tensor):
        # whole storage, so that a chunk stays a strided chunk
        moved = torch.empty(0, dtype=values.dtype, device=device)
        storage = values.untyped_storage()
        source = torch.empty(0, dtype=values.dtype, device=values.device).set_(storage)
        layout = values.storage_offset(), values.shape, values.stride()
        return moved.set_(source.to(device).untyped_storage(), *layout)
    if isinstance(values, dict):
        return {name: to(device, value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(to(device, value) for value in values)
    return values


class Runner:
    """Where ops run, and how; tensors go in and come out on the CPU."""

    def __init__(self, how, interpreter=None):
        self.options = {"implementation": "reference" if how == "reference" else "triton"}
        self.device = "cuda" if how == "triton" else "cpu"
        self.interpreter = interpreter

    def __call__(self, op, arguments, upstream=None, *, compiled="", **options):
        """(outputs, gradients), see `evaluate`."""
        arguments, upstream = to(self.device, [arguments, upstream])
        options |= self.options
        return to("cpu", self.call(evaluate, op, arguments, upstream, options, compiled))

    def call(self, function, *arguments):
        return self.interpreter(function, *arguments) if self.interpreter else function(*arguments)

    def inside(self, function, *arguments):
        """What a function returns that calls ops itself, which is told their options and device."""
        return self.call(function, *arguments, self.options, self.device)
