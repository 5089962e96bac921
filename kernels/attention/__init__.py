"""Softmax attention of every token with every token, by one of several backends."""

from .backends import BACKENDS, Backend
from .op import attention, attention_packed, current_backend, set_backend, use_backend
from .selection import select

__all__ = [
    "BACKENDS",
    "Backend",
    "attention",
    "attention_packed",
    "current_backend",
    "select",
    "set_backend",
    "use_backend",
]
