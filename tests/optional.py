"""Tests that need an optional package are skipped where it is absent; a pytest plug-in.

A module whose import needs it is skipped as a whole, a test that imports it later by itself.
"""

import contextlib
import importlib.util

import pytest

PACKAGES = (
    "diffusers",
    "lance",
    "mkdocs",
    "moto",
    "nvidia.dali",
    "skimage",
    "torch_fidelity",
    "torchdiffeq",
    "tyro",
    "wandb",
)


def absent(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `names` that cannot be imported."""

    def found(name: str) -> bool:
        with contextlib.suppress(ModuleNotFoundError):  # the package that it is in
            return importlib.util.find_spec(name) is not None
        return False

    return tuple(name for name in names if not found(name))


ABSENT = absent(PACKAGES)


def missing(error: BaseException | None) -> str | None:
    """The package of ABSENT for want of which `error` was raised, or None."""
    if isinstance(error, ModuleNotFoundError):
        for name in ABSENT:
            if f"{error.name}.".startswith(f"{name}."):
                return name
    return None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    excinfo = report.call.excinfo
    # pytest wraps what a module raises; a conftest.py's comes as it is
    name = excinfo and (missing(excinfo.value) or missing(excinfo.value.__cause__))
    if name:
        report.outcome, report.result = "skipped", []
        report.longrepr = (str(collector.path), 1, f"Skipped: needs {name}")
        report.call = None  # no exception that a debugger should stop at
    return report


def _skipping():
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if name := missing(error):
            pytest.skip(f"needs {name}")
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    return (yield from _skipping())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from _skipping())
