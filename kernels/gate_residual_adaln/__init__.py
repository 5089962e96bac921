"""Gated residual addition, alone and together with the adaLN that follows it."""

from .op import gate_residual, gate_residual_adaln

__all__ = ["gate_residual", "gate_residual_adaln"]
