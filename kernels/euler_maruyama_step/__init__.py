"""One step of the samplers: guidance, score, drift and diffusion."""

from .op import euler_maruyama_step

__all__ = ["euler_maruyama_step"]
