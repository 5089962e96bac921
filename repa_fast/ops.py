"""The functional API over the kernels; the only module that imports them."""

from repa_fast.kernels.adaln import adaln
from repa_fast.kernels.adamw_ema import adamw_ema, sum_of_squares, why_not_cuda
from repa_fast.kernels.align_loss import align_loss
from repa_fast.kernels.attention import BACKENDS as ATTENTION_BACKENDS
from repa_fast.kernels.attention import attention, attention_packed
from repa_fast.kernels.attention import select as select_attention
from repa_fast.kernels.attention import set_backend as set_attention_backend
from repa_fast.kernels.attention import use_backend as use_attention_backend
from repa_fast.kernels.euler_maruyama_step import euler_maruyama_step, standard_normal
from repa_fast.kernels.gate_residual_adaln import gate_residual, gate_residual_adaln

__all__ = [
    "ATTENTION_BACKENDS",
    "adaln",
    "adamw_ema",
    "align_loss",
    "attention",
    "attention_packed",
    "euler_maruyama_step",
    "gate_residual",
    "gate_residual_adaln",
    "select_attention",
    "set_attention_backend",
    "standard_normal",
    "sum_of_squares",
    "use_attention_backend",
    "why_not_cuda",
]
