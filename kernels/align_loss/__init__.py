"""Patch-wise negative cosine similarity (REPA's alignment loss)."""

from .op import align_loss

__all__ = ["align_loss"]
