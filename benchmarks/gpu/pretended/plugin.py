"""For pytest on the pretended card; `python -m benchmarks.gpu.pretended -m pytest ...` adds it.

A test that fails by a comparison of numbers is an expected failure: kernels do nothing here. All
other failures stay what they are.
"""

import os
from collections import Counter
from pathlib import Path
from traceback import clear_frames, walk_tb
from types import TracebackType

import pytest

from benchmarks.gpu.pretended import build, patches

COMPARES = ("repa_fast/testing.py", "torch/testing/", "numpy/testing/", "/tests/", "/test_")
"""Parts of the names of files in which an assertion speaks of numbers."""

_counts: Counter = Counter()
_failed: dict[str, str] = {}

patches.apply()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Tell a wrong number from a wrong launch."""
    outcome = yield
    report = outcome.get_result()
    if report.failed and call.when == "call" and of_numbers(call.excinfo):
        report.outcome, report.wasxfail = "skipped", "numbers are rubbish on a pretended card"
        drop_locals(call.excinfo.tb)
        report.user_properties.append(("pretended", "numbers"))
    elif report.failed:
        report.user_properties.append(("pretended", call.excinfo.exconly().splitlines()[0]))


def pytest_runtest_logreport(report):
    """Count; with xdist in the process that collects the reports."""
    said = dict(report.user_properties).get("pretended")
    if said == "numbers":
        _counts["numbers"] += report.when == "call"
    elif report.failed:
        _failed[report.nodeid] = said or "?"
    elif report.skipped:
        _counts["skipped"] += 1
    elif report.when == "call":
        _counts["passed"] += 1


def pytest_terminal_summary(terminalreporter):
    """Say how many tests there were of each kind, and write it to the report; no worker does."""
    from benchmarks.gpu.pretended import report

    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    row = {"kind": "tests", "failed": _failed}
    row |= {name: _counts[name] for name in ("passed", "numbers", "skipped")}
    report.write(row)
    for line in report.tests(row):
        terminalreporter.write_line(line)


def of_numbers(error) -> bool:
    """Return whether a test failed at a number: an assertion about one, or a mean of no steps.

    Or at none: what torch.testing takes for wrong in a tensor without elements, it divides by zero.
    """
    visible = error.traceback.filter(error) or error.traceback
    file = Path(str(visible[-1].path)).resolve().as_posix()
    mean_of_none = error.errisinstance(TypeError) and "NoneType" in str(error.value)
    of_none = error.errisinstance(RuntimeError) and str(error.value).startswith("Comparing")
    wrong = error.errisinstance(AssertionError) or mean_of_none or of_none
    return wrong and any(part in file for part in COMPARES)


def drop_locals(traceback: TracebackType) -> None:
    """Free what a failed test has on the card, which pytest keeps until the next one fails."""
    clear_frames(traceback)
    for frame, _ in walk_tb(traceback):
        frame.f_locals  # noqa: B018  # up to Python 3.12 a copy that pytest has made: made anew


def pytest_report_header():
    """Say where the tests run."""
    return "on the pretended card" if build.is_here() else "the pretended card is not loaded"
