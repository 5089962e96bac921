"""LayerNorm without affine, modulated per sample (adaLN)."""

from .op import adaln

__all__ = ["adaln"]
