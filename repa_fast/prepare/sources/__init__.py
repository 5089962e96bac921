"""Where images come from, behind one protocol."""

from .base import Item, Source, Subset, subset
from .open import KINDS, open_source

__all__ = ["KINDS", "Item", "Source", "Subset", "open_source", "subset"]
