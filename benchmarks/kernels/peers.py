"""Other packages' kernels that do what adaln does, or come near.

None of them is a dependency. They normalise and leave the modulation to torch.compile, but for
Liger's, which is an RMS norm, and cuDNN's; all return the dtype of x, so an fp32 stream costs them
a cast.
Read in liger-kernel 0.8.5, quack-kernels 0.6.5, nvidia-cudnn-frontend 1.32 and apex's repository.
"""

import functools
import importlib
from collections.abc import Callable

import torch

EPS = 1e-6


def why_not(module: str, *names: str) -> str | None:
    """Why `module` does not import with these names, in one line; None if it does."""
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            return f"{module.partition('.')[0]} is not installed"
        return f"{module} does not import: {error}"
    except Exception as error:  # a broken binary package raises anything
        return f"{module} does not import: {type(error).__name__}: {error}".splitlines()[0]
    missing = [name for name in names if not hasattr(imported, name)]
    return f"{module} has no {', '.join(missing)}" if missing else None


def needs_cuda(device: str, module: str, *names: str) -> str | None:
    """why_not, or that tensors on `device` are not for these kernels."""
    reason = why_not(module, *names)
    return reason or (None if device == "cuda" else f"its kernels do not run on {device}")


def modulated(norm: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """(x, shift, scale) -> norm(x) * (1 + scale) + shift in the dtype of shift.

    The modulation is one kernel of torch.compile each way, as a user of `norm` would have it.
    """

    @torch.compile(dynamic=False)
    def modulate(y: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        work = y.float() * (1 + scale.float()[:, None]) + shift.float()[:, None]
        return work.to(shift.dtype)

    return lambda x, shift, scale: modulate(norm(x), shift, scale)


def rms_formula(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What Liger's computes: x / rms(x) * (1 + scale) + shift, in at least fp32."""
    work = torch.promote_types(x.dtype, torch.float32)
    x = x.to(work)
    normed = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return (normed * (1 + scale.to(work)[:, None]) + shift.to(work)[:, None]).to(shift.dtype)


def liger() -> Callable[..., torch.Tensor]:
    """Its function without weight, computed in fp32 throughout, not overwriting dy."""
    from liger_kernel.transformers.modulated_rms_norm import LigerModulatedRMSNorm

    module = LigerModulatedRMSNorm(
        0, eps=EPS, casting_mode="gemma", in_place=False, elementwise_affine=False
    )
    return lambda x, shift, scale: module(x, scale, shift).to(shift.dtype)


def apex() -> Callable[..., torch.Tensor]:
    """Its fused_layer_norm without affine; FastLayerNorm has no kernel for D = 1152."""
    from apex.normalization.fused_layer_norm import fused_layer_norm

    return modulated(lambda x: fused_layer_norm(x, x.shape[-1:], EPS))


def quack() -> Callable[..., torch.Tensor]:
    """layernorm_fwd and layernorm_bwd with a weight of ones, which they require."""
    return modulated(lambda x: QuackLayerNorm.apply(x.flatten(0, 1)).view_as(x))


class QuackLayerNorm(torch.autograd.Function):
    """(R, D) -> (R, D), normalised; the gradient of the weight is computed and dropped."""

    @staticmethod
    def forward(ctx, x):
        from quack.rmsnorm import layernorm_fwd

        weight = _ones(x.shape[-1], x.device)
        y, rstd, mean = layernorm_fwd(x, weight, eps=EPS, return_rstd=True, return_mean=True)
        ctx.save_for_backward(x, weight, rstd, mean)
        return y

    @staticmethod
    def backward(ctx, dy):
        from quack.rmsnorm import layernorm_bwd

        return layernorm_bwd(*_quack_arguments(ctx, dy), has_bias=False)[0]


def _quack_arguments(ctx, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x, weight, rstd, mean = ctx.saved_tensors
    return x, weight, dy.contiguous(), rstd, mean


@functools.cache
def _ones(width: int, device: torch.device) -> torch.Tensor:
    return torch.ones(width, device=device)


def cudnn() -> Callable[..., torch.Tensor]:
    """adalayernorm and adalayernorm_backward; cuDNN's scale is the whole factor, so 1 + scale."""

    def adaln(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        factor = (1 + scale.float())[:, None].contiguous()
        return CudnnAdaLN.apply(x, factor, shift.float()[:, None].contiguous()).to(shift.dtype)

    return adaln


class CudnnAdaLN(torch.autograd.Function):
    """x (B, N, D), scale and bias (B, 1, D) fp32 -> (B, N, D) in the dtype of x."""

    @staticmethod
    def forward(ctx, x, scale, bias):
        graph, places = _cudnn_forward(tuple(x.shape), x.dtype, x.device)
        y = torch.empty_like(x)
        mean, rstd = (torch.empty_like(x[..., :1], dtype=torch.float32) for _ in range(2))
        mean, rstd = mean.contiguous(), rstd.contiguous()
        epsilon = torch.full((1, 1, 1), EPS)
        _cudnn_run(graph, places, (x, scale, bias, epsilon, y, mean, rstd))
        ctx.save_for_backward(x, scale, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, scale, mean, rstd = ctx.saved_tensors
        graph, places = _cudnn_backward(tuple(x.shape), x.dtype, x.device)
        dx, dscale, dbias = torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)
        _cudnn_run(graph, places, (dy.contiguous(), x, scale, mean, rstd, dx, dscale, dbias))
        return dx, dscale, dbias


@functools.cache
def _cudnn_handle():
    import cudnn

    return cudnn.create_handle()


def _cudnn_graph():
    import cudnn

    return cudnn.pygraph(
        handle=_cudnn_handle(),
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
    )


def _cudnn_type(dtype: torch.dtype):
    import cudnn

    return {
        torch.float32: cudnn.data_type.FLOAT,
        torch.bfloat16: cudnn.data_type.BFLOAT16,
        torch.float16: cudnn.data_type.HALF,
    }[dtype]


def _cudnn_places(graph, shape: tuple[int, int, int], dtype: torch.dtype) -> dict:
    """Makers of the graph's input tensors: of a stream, of a vector per sample, of a statistic."""
    import cudnn

    batch, tokens, width = shape
    full = {"dim": [batch, tokens, width], "stride": [tokens * width, width, 1]}
    vector = {"dim": [batch, 1, width], "stride": [width, width, 1]}
    statistic = {"dim": [batch, tokens, 1], "stride": [tokens, 1, 1]}
    single = cudnn.data_type.FLOAT
    return {
        "full": lambda name: graph.tensor(name=name, data_type=_cudnn_type(dtype), **full),
        "vector": lambda name: graph.tensor(name=name, data_type=single, **vector),
        "statistic": lambda name: graph.tensor(name=name, data_type=single, **statistic),
    }


def _cudnn_finish(graph, outputs: dict) -> None:
    """Mark the outputs {tensor of the graph: dtype} and build the first plan that is supported."""
    import cudnn

    for output, dtype in outputs.items():
        output.set_output(True).set_data_type(_cudnn_type(dtype))
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()


@functools.cache
def _cudnn_forward(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device):
    import cudnn

    graph = _cudnn_graph()
    make = _cudnn_places(graph, shape, dtype)
    x, scale, bias = make["full"]("x"), make["vector"]("scale"), make["vector"]("bias")
    epsilon = graph.tensor_like(torch.full((1, 1, 1), EPS)).set_name("epsilon")
    y, mean, rstd = graph.adalayernorm(
        name="adaln",
        norm_forward_phase=cudnn.norm_forward_phase.TRAINING,
        input=x,
        scale=scale,
        bias=bias,
        epsilon=epsilon,
    )
    _cudnn_finish(graph, {y: dtype, mean: torch.float32, rstd: torch.float32})
    return graph, (x, scale, bias, epsilon, y, mean, rstd)


@functools.cache
def _cudnn_backward(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device):
    graph = _cudnn_graph()
    make = _cudnn_places(graph, shape, dtype)
    dy, x, scale = make["full"]("dy"), make["full"]("x"), make["vector"]("scale")
    mean, rstd = make["statistic"]("mean"), make["statistic"]("rstd")
    dx, dscale, dbias = graph.adalayernorm_backward(
        name="adaln_backward", grad=dy, input=x, scale=scale, mean=mean, inv_variance=rstd
    )
    _cudnn_finish(graph, {dx: dtype, dscale: torch.float32, dbias: torch.float32})
    return graph, (dy, x, scale, mean, rstd, dx, dscale, dbias)


def _cudnn_run(graph, places: tuple, tensors: tuple[torch.Tensor, ...]) -> None:
    import cudnn

    handle = _cudnn_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    size = max(1, graph.get_workspace_size())
    workspace = torch.empty(size, dtype=torch.uint8, device=tensors[0].device)
    graph.execute(dict(zip(places, tensors)), workspace, handle=handle)
