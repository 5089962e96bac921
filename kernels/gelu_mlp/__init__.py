"""A transformer's MLP, with GELU and bias gradients inside the matrix products."""

from .op import gelu_mlp

__all__ = ["gelu_mlp"]
