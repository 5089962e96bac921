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

from repa_fast.kernels.attention.backends import describe

EPS = 1e-6


def why_not(device: str, module: str, *names: str) -> str | None:
    """Return why `module` does not import with these names or run on `device`, or None."""
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            return f"{module.partition('.')[0]} is not installed"
        return f"{module} does not import: {error}"
    except Exception as error:  # a broken binary package raises anything
        return f"{module} does not import: {describe(error)}"
    if missing := [name for name in names if not hasattr(imported, name)]:
        return f"{module} has no {', '.join(missing)}"
    return None if device == "cuda" else f"its kernels do not run on {device}"


def modulated(norm: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return (x, shift, scale) -> norm(x) * (1 + scale) + shift in the dtype of shift.

    The modulation is one kernel of torch.compile each way, as a user of `norm` would have it.
    """

    @torch.compile(dynamic=False)
    def modulate(y: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        work = y.float() * (1 + scale.float()[:, None]) + shift.float()[:, None]
        return work.to(shift.dtype)

    return lambda x, shift, scale: modulate(norm(x), shift, scale)


def rms_formula(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Compute what Liger's does: x / rms(x) * (1 + scale) + shift, in at least fp32."""
    work = torch.promote_types(x.dtype, torch.float32)
    x = x.to(work)
    normed = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return (normed * (1 + scale.to(work)[:, None]) + shift.to(work)[:, None]).to(shift.dtype)


def liger() -> Callable[..., torch.Tensor]:
    """Return its function without weight, in fp32 throughout, not overwriting dy."""
    from liger_kernel.transformers.modulated_rms_norm import LigerModulatedRMSNorm

    module = LigerModulatedRMSNorm(
        0, eps=EPS, casting_mode="gemma", in_place=False, elementwise_affine=False
    )
    return lambda x, shift, scale: module(x, scale, shift).to(shift.dtype)


def apex() -> Callable[..., torch.Tensor]:
    """Return its fused_layer_norm without affine; FastLayerNorm has no kernel for D = 1152."""
    from apex.normalization.fused_layer_norm import fused_layer_norm

    return modulated(lambda x: fused_layer_norm(x, x.shape[-1:], EPS))


def quack() -> Callable[..., torch.Tensor]:
    """Return layernorm_fwd and layernorm_bwd with a weight of ones, which they require."""
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

        x, weight, rstd, mean = ctx.saved_tensors
        return layernorm_bwd(x, weight, dy.contiguous(), rstd, mean, has_bias=False)[0]


@functools.cache
def _ones(width: int, device: torch.device) -> torch.Tensor:
    return torch.ones(width, device=device)


def cudnn() -> Callable[..., torch.Tensor]:
    """Return adalayernorm and its backward; cuDNN's scale is the whole factor, so 1 + scale."""

    def adaln(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        factor = (1 + scale.float())[:, None].contiguous()
        return CudnnAdaLN.apply(x, factor, shift.float()[:, None].contiguous()).to(shift.dtype)

    return adaln


class CudnnAdaLN(torch.autograd.Function):
    """x (B, N, D), scale and bias (B, 1, D) fp32 -> (B, N, D) in the dtype of x."""

    @staticmethod
    def forward(ctx, x, scale, bias):
        y = torch.empty_like(x)
        mean, rstd = (torch.empty_like(x[..., :1], dtype=torch.float32) for _ in range(2))
        mean, rstd = mean.contiguous(), rstd.contiguous()
        epsilon = torch.full((1, 1, 1), EPS)
        _cudnn_run("forward", x, x, scale, bias, epsilon, y, mean, rstd)
        ctx.save_for_backward(x, scale, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, scale, mean, rstd = ctx.saved_tensors
        dx, dscale, dbias = torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)
        _cudnn_run("backward", x, dy.contiguous(), x, scale, mean, rstd, dx, dscale, dbias)
        return dx, dscale, dbias


@functools.cache
def _cudnn_handle():
    import cudnn

    return cudnn.create_handle()


@functools.cache
def _cudnn_graph(way: str, shape: tuple[int, int, int], dtype: torch.dtype):
    """Build the graph of a pass; return it, and its inputs and outputs in order."""
    import cudnn

    f32, (batch, tokens, width) = cudnn.data_type.FLOAT, shape
    types = {torch.float32: f32, torch.bfloat16: cudnn.data_type.BFLOAT16}
    types[torch.float16] = cudnn.data_type.HALF
    graph = cudnn.pygraph(handle=_cudnn_handle(), intermediate_data_type=f32, compute_data_type=f32)

    def tensor(name: str, tokens: int, width: int, data_type=f32):
        dim, stride = [batch, tokens, width], [tokens * width, width, 1]
        return graph.tensor(name=name, dim=dim, stride=stride, data_type=data_type)

    x, scale = tensor("x", tokens, width, types[dtype]), tensor("scale", 1, width)
    if way == "forward":
        bias = tensor("bias", 1, width)
        epsilon = graph.tensor_like(torch.full((1, 1, 1), EPS)).set_name("epsilon")
        inputs = (x, scale, bias, epsilon)
        outputs = graph.adalayernorm(
            name="adaln",
            norm_forward_phase=cudnn.norm_forward_phase.TRAINING,
            input=x,
            scale=scale,
            bias=bias,
            epsilon=epsilon,
        )
    else:
        dy = tensor("dy", tokens, width, types[dtype])
        mean, rstd = tensor("mean", tokens, 1), tensor("rstd", tokens, 1)
        inputs = (dy, x, scale, mean, rstd)
        outputs = graph.adalayernorm_backward(
            name="adaln_backward", grad=dy, input=x, scale=scale, mean=mean, inv_variance=rstd
        )
    for output, data_type in zip(outputs, (types[dtype], f32, f32)):
        output.set_output(True).set_data_type(data_type)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return graph, (*inputs, *outputs)


def _cudnn_run(way: str, x: torch.Tensor, *tensors: torch.Tensor) -> None:
    """Run the graph of a pass for tensors like x on its inputs and outputs."""
    import cudnn

    graph, places = _cudnn_graph(way, tuple(x.shape), x.dtype)
    handle = _cudnn_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    size = max(1, graph.get_workspace_size())
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    graph.execute(dict(zip(places, tensors)), workspace, handle=handle)
