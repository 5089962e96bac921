"""One step of the samplers: guidance, score, drift and diffusion."""

from .op import euler_maruyama_step
from .reference import standard_normal

__all__ = ["euler_maruyama_step", "standard_normal"]
