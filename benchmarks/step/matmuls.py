"""Times of bf16 matmuls on a card that is not there, as nvidia-matmul-heuristics estimates them.

It knows no power limit: what it says of large matmuls, a card reaches for a moment at best.
"""

import functools
from collections.abc import Iterable

from benchmarks.step.launches import Launch

CARDS = ("H100", "H200")
CANDIDATES = 8


def milliseconds(launches: Iterable[Launch], card: str) -> float:
    """Return the estimate for all matmuls among the launches, on one of CARDS.

    Raises:
        ImportError: nvidia-matmul-heuristics is not installed.
    """
    return sum(1e3 * _seconds(card, *one.matmul) for one in launches if one.matmul)


@functools.cache
def _seconds(card: str, m: int, n: int, k: int, layout: str) -> float:
    from nvMatmulHeuristics import NvMatmulHeuristicsMatmulLayout as Layout

    interface = _interface(card)
    problem = interface.makeNvMatmulHeuristicsProblem(m, n, k, Layout[f"{layout}_ROW_MAJOR"])
    found = interface.get(problem, CANDIDATES, "TST")  # bf16 in and out, sums in fp32
    return min(one["runtime"] for one in found)


@functools.cache
def _interface(card: str):
    import nvMatmulHeuristics as nv

    flags = nv.NvMatmulHeuristicsFlags
    return nv.NvMatmulHeuristicsInterfaceEx(
        backend=nv.NvMatmulHeuristicsTarget.CUTLASS3,
        flags=flags.PERF_MODEL_BASED_AUTO_TUNING | flags.REFINE_CANDIDATES_USING_TIMING_MODEL,
        load_discovery_implicitly=True,
        gpu=nv.NvMatmulHeuristicsNvidiaGpu[f"{card}_SXM"],
    )
