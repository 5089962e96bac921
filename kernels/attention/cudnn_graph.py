"""cuDNN's attention on a packed qkv, through graphs of its Python frontend (the package cudnn).

torch runs the same kernels, but takes dq, dk and dv as three tensors. Read in nvidia-cudnn-frontend
1.22 and 1.32; shapes as in packed.py. Strides have to be multiples of 16 bytes.
"""

import atexit
import functools
import threading

import torch
from torch import Tensor


def forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return out and lse."""
    batch, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty((batch, tokens, heads, head_dim))
    lse = qkv.new_empty((batch, heads, tokens), dtype=torch.float32)
    _run("sdpa", scale, *qkv.unbind(2), out, lse)
    return out, lse


def backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Return dqkv."""
    dqkv = qkv.new_empty(qkv.shape)
    _run("sdpa_backward", scale, *qkv.unbind(2), out, dout, lse, *dqkv.unbind(2))
    return dqkv


def _run(operation: str, scale: float, *tensors: Tensor) -> None:
    """Run a graph on its inputs and outputs, on the current stream, without waiting for it."""
    import cudnn

    # (B, H, N, K), and (B, H, N, 1) of the log-sum-exp
    tensors = [x.transpose(1, 2) if x.ndim == 4 else x[..., None] for x in tensors]
    device = tensors[0].device
    layouts = tuple((tuple(x.shape), x.stride(), x.dtype) for x in tensors)
    deterministic = torch.are_deterministic_algorithms_enabled()
    handle = _handle(device, threading.get_ident())
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    graph, places = _graph(operation, scale, deterministic, handle, layouts)
    size = max(1, graph.get_workspace_size())
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    graph.execute(dict(zip(places, tensors, strict=True)), workspace, handle=handle)


@functools.cache
def _handle(device: torch.device, thread: int):
    """Create the handle of a thread: backward passes run in their own."""
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()


@functools.cache
def _graph(operation: str, scale: float, deterministic: bool, handle, layouts: tuple) -> tuple:
    """Build a graph for tensors of these shapes, strides and dtypes; return it and their places."""
    import cudnn

    types = cudnn.data_type
    names = {torch.bfloat16: types.BFLOAT16, torch.float16: types.HALF, torch.float32: types.FLOAT}
    graph = cudnn.pygraph(
        handle=handle,
        io_data_type=names[layouts[0][2]],
        intermediate_data_type=types.FLOAT,
        compute_data_type=types.FLOAT,
    )
    roles, options = ("q", "k", "v"), {"generate_stats": True}
    if operation == "sdpa_backward":
        roles += ("o", "dO", "stats")
        options = {"use_deterministic_algorithm": deterministic}
    given = {
        role: graph.tensor(name=role, dim=shape, stride=stride, data_type=names[dtype])
        for role, (shape, stride, dtype) in zip(roles, layouts)
    }
    results = getattr(graph, operation)(name=operation, **given, attn_scale=scale, **options)
    for result, (shape, stride, dtype) in zip(results, layouts[len(roles) :], strict=True):
        result.set_output(True).set_dim(shape).set_stride(stride).set_data_type(names[dtype])
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    return graph, (*given.values(), *results)


atexit.register(_graph.cache_clear)  # what is left then, the package reports as leaked
