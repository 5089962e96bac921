"""AdamW, the EMA of the weights and their bf16 copies in one pass over memory."""

from .op import adamw_ema, sum_of_squares, why_not_cuda

__all__ = ["adamw_ema", "sum_of_squares", "why_not_cuda"]
