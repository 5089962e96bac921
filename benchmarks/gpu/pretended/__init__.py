"""A GPU that is not there: torch, compilers and launches are real, kernels do nothing (README.md).

`python -m benchmarks.gpu.pretended -m MODULE [ARGS...]` runs a program on it.
"""

waits: list[str] = []
"""Places in our code at which the host waited for the device."""
