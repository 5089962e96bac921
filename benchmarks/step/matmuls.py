"""Times of matmuls on a card that is not there, as nvidia-matmul-heuristics estimates them.

It knows no power limit: what it says of large matmuls, an H100 reaches at best for a moment.
"""

import functools
from collections.abc import Iterable

from benchmarks.step.launches import Launch

CARDS = {"H100": "H100_SXM", "H200": "H200_SXM"}
LAYOUTS = {"NN": "NN_ROW_MAJOR", "NT": "NT_ROW_MAJOR", "TN": "TN_ROW_MAJOR", "TT": "TT_ROW_MAJOR"}
CANDIDATES = 8


def milliseconds(launches: Iterable[Launch], card: str) -> float:
    """Return the estimate for all matmuls among the launches, in bf16, on one of CARDS.

    Raises:
        ImportError: nvidia-matmul-heuristics is not installed.
    """
    return sum(_seconds(card, *one.matmul) * 1e3 for one in launches if one.matmul)


@functools.cache
def _seconds(card: str, m: int, n: int, k: int, layout: str) -> float:
    import nvMatmulHeuristics as heuristics

    kind = heuristics.NvMatmulHeuristicsMatmulLayout[LAYOUTS[layout]]
    interface = _interface(card)
    problem = interface.makeNvMatmulHeuristicsProblem(m, n, k, kind)
    found = interface.get(problem, CANDIDATES, "TST")  # bf16 in and out, sums in fp32
    return min(one["runtime"] for one in found)


@functools.cache
def _interface(card: str):
    import nvMatmulHeuristics as heuristics

    flags = heuristics.NvMatmulHeuristicsFlags
    return heuristics.NvMatmulHeuristicsInterfaceEx(
        backend=heuristics.NvMatmulHeuristicsTarget.CUTLASS3,
        flags=flags.PERF_MODEL_BASED_AUTO_TUNING | flags.REFINE_CANDIDATES_USING_TIMING_MODEL,
        load_discovery_implicitly=True,
        gpu=heuristics.NvMatmulHeuristicsNvidiaGpu[CARDS[card]],
    )
