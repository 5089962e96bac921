"""The library that setup.py builds from csrc/, if it is there."""

import functools
from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "lib" / "csrc.so"

OPERATORS = {"adamw_ema": "Tensor?(f!)[] param_copies, Tensor lr", "sum_of_squares": "out"}
"""Each with a part of its schema that earlier ones lack. They write into their arguments and return
nothing."""


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
    found = torch.ops.repa_fast
    missing = [
        name
        for name, argument in OPERATORS.items()
        if not hasattr(found, name) or argument not in str(getattr(found, name).default._schema)
    ]
    if missing:
        return f"{LIBRARY.name} lacks {', '.join(missing)}: its sources are older, build it again"
    for name in OPERATORS:
        torch.library.register_fake(f"repa_fast::{name}", lambda *arguments: None)
    return ""
