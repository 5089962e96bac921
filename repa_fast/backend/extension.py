"""The library that setup.py builds from csrc/, if it is there."""

import functools
from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "lib" / "csrc.so"

OPERATORS = ("adamw_ema", "sum_of_squares")
"""They write into their arguments and return nothing."""


@functools.cache
def why_not() -> str:
    """Load the library's operators; return why it cannot, or "" if it did."""
    if not LIBRARY.is_file():
        return (
            f"{LIBRARY.name} is not built (python setup.py build_ext --inplace, "
            "or pip install --no-build-isolation)"
        )
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"{LIBRARY.name} does not load: {error}"
    missing = [name for name in OPERATORS if not hasattr(torch.ops.repa_fast, name)]
    if missing:
        return f"{LIBRARY.name} lacks {', '.join(missing)}: its sources are older, build it again"
    for name in OPERATORS:
        torch.library.register_fake(f"repa_fast::{name}", lambda *arguments: None)
    return ""
