"""Which tests run: the fast tier by default, everything under `--full`.

What a test needs is said by its fixtures, and the marks follow from them: `heavy` leaves a test to
the full tier; `ranks` and `torchrun` (several processes), `inductor` (torch.compile) and `build`
(compiling the project) keep tests that would fight for the same thing in one pytest-xdist worker.
Of a test with several parametrisations the fast tier runs as many cases as show each value of each
one once, the full tier their product.
"""

import collections

import pytest

GROUPS = {"ranks": "ranks", "torchrun": "ranks", "inductor": "inductor", "build": "build"}
"""Fixture -> the group of pytest-xdist that its tests run in."""


@pytest.fixture
def heavy():
    """Leave the test to the full tier: it takes seconds, and a quicker one covers the same code."""


@pytest.fixture
def build():
    """Let no other test that builds the project run beside this one."""


@pytest.fixture
def inductor():
    """Begin with no compiled code and no counts, for a test that compiles with Inductor."""
    import torch._dynamo.utils

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def mark(item: pytest.Item) -> None:
    """Set the marks that follow from an item's fixtures."""
    fixtures = set(getattr(item, "fixturenames", ()))
    if "heavy" in fixtures:
        item.add_marker("heavy")
    for fixture in GROUPS.keys() & fixtures:
        item.add_marker(fixture)
        item.add_marker(pytest.mark.xdist_group(GROUPS[fixture]))


def values(item: pytest.Item) -> set[tuple]:
    """Return (names, value) of each of an item's parametrisations, fixtures' among them."""
    if not hasattr(item, "callspec"):
        return {((), 0)}
    left, found = dict(item.callspec.params), set()
    for marker in item.iter_markers("parametrize"):
        names = marker.args[0] if marker.args else marker.kwargs["argnames"]
        names = names.split(",") if isinstance(names, str) else names
        names = tuple(name.strip() for name in names)
        found.add((names, tuple(id(left.pop(name)) for name in names)))
    return found | {((name,), (id(value),)) for name, value in left.items()}


def thin(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the items, in their order, of which no value of any parametrisation is missing.

    Cases that need a GPU stand for no others: where there is none they are skipped.
    """
    cases = collections.defaultdict(list)
    for item in items:
        on_gpu = item.get_closest_marker("gpu") is not None
        cases[item.nodeid.partition("[")[0], on_gpu].append((item, values(item)))
    kept = set()
    for group in cases.values():
        missing = set().union(*(shown for _, shown in group))
        while missing:
            item, shown = max(group, key=lambda case: len(case[1] & missing))
            kept.add(item)
            missing -= shown
    return [item for item in items if item in kept]


def fast(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the items of the fast tier."""
    return thin([item for item in items if not item.get_closest_marker("heavy")])
