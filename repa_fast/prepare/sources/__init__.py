"""Where images come from, behind one protocol."""

from .base import Item, Source, Subset
from .open import open_source

__all__ = ["Item", "Source", "Subset", "open_source"]
