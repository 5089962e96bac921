"""The fast tier: no module is without a test in it, what it leaves out, and what it keeps."""

import ast
import collections
import re
from pathlib import Path

import pytest

from tests.refusals import refused
from tests.test_house import read_modules, written

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]
SLOW = {"heavy", "gpu", "smoke_full"}
"""The fixture and the marks of tests that are not of the fast tier."""
THROUGH = {
    "backend.registration": "ops",
    "backend.rows": "backend.launch",
    "checkpoint.adamw": "train.resume",
    "diffusion.guidance": "diffusion.samplers",
    "encoders.files": "encoders.vit",
    "kernels.__init__": "ops",
    "kernels.adaln": "ops",
    "kernels.gate_residual_adaln": "ops",
    "objective.ddpm": "objective.__init__",
    "objective.flow": "objective.__init__",
    "prepare.sources.base": "prepare.sources.__init__",
    "prepare.sources.flat": "prepare.sources.__init__",
    "prepare.sources.folder": "prepare.sources.__init__",
    "prepare.sources.open": "prepare.sources.__init__",
    "prepare.sources.webdataset": "prepare.sources.__init__",
}
"""Modules that tests reach through another one alone, which stands for them."""


# Every module has a test in the fast tier


def leaves_out(node: ast.expr) -> bool:
    """Whether it is a mark that keeps tests out of the fast tier: all of them, not single cases."""
    words = set(re.findall(r"\w+", ast.unparse(node)))
    return bool(words & SLOW) and "parametrize" not in words


def source_in_fast_tier(source: str) -> str:
    """What the fast tier runs of a test module: nothing if it runs none of its tests."""
    kept, tests = [], 0
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            if any(map(leaves_out, getattr(node.value, "elts", [node.value]))):
                return ""
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            if "heavy" in ast.unparse(node.args) or any(map(leaves_out, node.decorator_list)):
                continue
            tests += 1
        kept.append(node)
    return ast.unparse(ast.Module(kept, [])) if tests else ""


def imported(sources: dict[str, str], modules: set[str]) -> set[str]:
    """The modules that the tests of the fast tier import by name, or helpers that these import.

    Args:
        sources: of everything in tests/, by dotted name.
        modules: what is looked for, packages under NAME.__init__.
    """
    known, found = modules | sources.keys(), set()

    def look_into(name: str, source: str) -> None:
        for dotted in written(name, source):
            outer = dotted.rpartition(".")[0]
            names = (dotted, f"{dotted}.__init__", outer, f"{outer}.__init__")
            target = next((one for one in names if one in known), None)
            if target and target not in found:
                found.add(target)
                if target in sources and ".test_" not in target:
                    look_into(target, sources[target])

    for name, source in sources.items():
        if name.rpartition(".")[2].startswith("test_") and (ran := source_in_fast_tier(source)):
            look_into(name, f"{ran}\nimport {name.rpartition('.')[0]}.conftest")
    return found & modules


def has_code(source: str) -> bool:
    """Whether a module does more than import and describe itself."""
    kinds = (ast.Import, ast.ImportFrom, ast.Expr)
    return not all(isinstance(node, kinds) for node in ast.parse(source).body)


def op(name: str) -> str:
    """The package of a kernel's op, a module's own name elsewhere."""
    return ".".join(name.split(".")[:3]) if name.startswith("repa_fast.kernels.") else name


def test_every_module_is_imported_by_a_test_of_the_fast_tier():
    files = {file: file.relative_to(ROOT).with_suffix("") for file in ROOT.glob("tests/**/*.py")}
    sources = {".".join(path.parts): file.read_text() for file, path in files.items()}
    modules = {name: text for name, text in read_modules().items() if name.startswith("repa_fast.")}
    wanted = {n for n, text in modules.items() if not n.endswith("__init__") or has_code(text)}
    found = set(map(op, imported(sources, set(modules))))
    doors = {f"repa_fast.{name}": f"repa_fast.{door}" for name, door in THROUGH.items()}
    assert doors.keys() <= set(map(op, modules)) and not doors.keys() & found
    missing = {name for name in map(op, wanted) if doors.get(name, name) not in found}
    assert not missing, "\n".join(sorted(missing))


@pytest.mark.parametrize(
    "source, found",
    [
        ("from repa_fast.a.b import c\ndef test(): pass", {"b"}),
        ("from repa_fast.a import b\ndef test(): pass", {"b"}),
        ("import repa_fast.a.b\ndef test(): pass", {"b"}),
        ("def test(): from repa_fast.a import b", {"b"}),
        ("from repa_fast.a import *\ndef test(): pass", {"__init__"}),
        ("from tests.x import helper\ndef test(): pass", {"c"}),
        ("from repa_fast.a import b", set()),
        ("from repa_fast.a import b\ndef test(heavy): pass", set()),
        ("from repa_fast.a import b\n@pytest.mark.gpu\ndef test(): pass", set()),
        ("def test(): pass\n@pytest.mark.heavy\ndef test_b(): import repa_fast.a.b", set()),
        (
            "import repa_fast.a.b\npytestmark = [pytest.mark.usefixtures('heavy')]\ndef test(): 1",
            set(),
        ),
    ],
)
def test_what_counts_as_imported_by_the_fast_tier(source, found):
    modules = {"repa_fast.a.__init__", "repa_fast.a.b", "repa_fast.a.c"}
    source = source.replace("def test(", "def test_a(")
    sources = {"tests.x.test_y": source, "tests.x.helper": "import repa_fast.a.c"}
    assert {name.rpartition(".")[2] for name in imported(sources, modules)} == found


# What pytest runs

CONFTEST = """
import pytest
from tests.conftest import pytest_addoption, pytest_collection_modifyitems
from tests.tiers import build, heavy, inductor

@pytest.fixture(params=["left", "right"])
def side(request):
    return request.param

@pytest.fixture
def ranks():
    pass

@pytest.fixture
def torchrun(heavy):
    pass
"""
COLLECTED = """
import pytest

def test_plain(): pass
def test_left_out(heavy): pass
def test_left_out_by_a_fixture(torchrun): pass
@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.heavy)])
def test_one_case(n): pass
@pytest.mark.parametrize("a, b", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_rows(a, b): pass
@pytest.mark.parametrize("a", [1, 2, 3])
@pytest.mark.parametrize("b", [1, 2])
def test_grid(a, b, side): pass
class TestIn:
    @pytest.mark.parametrize("n", [1, 2])
    def test_twice(self, n, side): pass
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("how", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_skipped(n, how): pass
def test_together(ranks, side): pass
def test_compiled(inductor): pass
def test_built(build): pass
"""


FAST = {"test_plain": 1, "test_one_case": 1, "test_rows": 4, "test_grid": 3, "test_twice": 2}
FAST |= {"test_together": 2, "test_compiled": 1, "test_built": 1, "test_skipped": 4}
FULL = FAST | {"test_left_out": 1, "test_left_out_by_a_fixture": 1, "test_one_case": 2}
FULL |= {"test_grid": 12, "test_twice": 4}
"""Test -> how many cases run."""


@pytest.fixture
def collect(pytester):
    """collect(*flags) -> the items that pytest would run, and how many it left out."""
    marks = ("heavy", "gpu", "ranks", "torchrun", "inductor", "build", "xdist_group(name)")
    pytester.makeini("[pytest]\nmarkers =\n" + "\n".join(f"    {name}: ..." for name in marks))
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(COLLECTED)

    def items(*flags):
        calls = pytester.inline_run("--collect-only", *flags)
        left_out = calls.getcalls("pytest_deselected")
        (finished,) = calls.getcalls("pytest_collection_finish")
        return finished.session.items, sum(len(call.items) for call in left_out)

    return items


def counts(items):
    return collections.Counter(item.originalname for item in items)


def test_the_fast_tier_leaves_out_heavy_tests_and_all_but_a_few_cases_of_a_grid(collect):
    items, left_out = collect()
    assert counts(items) == FAST and left_out == sum(FULL.values()) - sum(FAST.values())
    shown = collections.defaultdict(set)
    for item in items:
        for name, value in item.callspec.params.items() if hasattr(item, "callspec") else ():
            shown[item.originalname, name].add(value)
    assert shown["test_grid", "a"] == {1, 2, 3} and shown["test_grid", "b"] == {1, 2}
    for test in ("test_grid", "test_twice", "test_together"):
        assert shown[test, "side"] == {"left", "right"}
    assert shown["test_twice", "n"] == {1, 2} and shown["test_one_case", "n"] == {1}


def test_full_keeps_everything_and_a_mark_chooses_among_it(collect):
    items, left_out = collect("--full")
    assert counts(items) == FULL and left_out == 0
    slow = {"test_left_out", "test_left_out_by_a_fixture", "test_one_case"}
    assert counts(collect("--full", "-m", "heavy")[0]) == dict.fromkeys(slow, 1)
    assert collect("-m", "heavy")[0] == []


def test_marks_and_groups_follow_from_fixtures_and_what_takes_longest_runs_first(collect):
    items, _ = collect("--full")
    assert [item.originalname for item in items[:2]] == ["test_together"] * 2
    marks, groups = {}, {}
    for item in items:
        marks[item.originalname] = {mark.name for mark in item.iter_markers()}
        if group := item.get_closest_marker("xdist_group"):
            groups[item.originalname] = group.args
    assert marks["test_left_out_by_a_fixture"] == {"heavy", "torchrun", "xdist_group"}
    assert marks["test_together"] == {"ranks", "xdist_group"} and marks["test_plain"] == set()
    together = dict.fromkeys(("test_together", "test_left_out_by_a_fixture"), ("ranks",))
    assert groups == together | {"test_compiled": ("inductor",), "test_built": ("build",)}


# How a refusal is told


def raising(message, error=ValueError):
    def call():
        raise error(message)

    return call


def test_a_refusal_has_every_word_in_one_line():
    message = "size is 0, expected at least 1"
    assert refused(raising(message), "size is 0", r"at least \d$") == message
    assert refused(raising("no", OSError), error=OSError) == "no"


@pytest.mark.parametrize(
    "call, words, error",
    [
        (raising("size is 0\nmore"), "size", AssertionError),
        (raising("size is 0"), "expected", AssertionError),
        (raising("size is 0", OSError), "size", OSError),
        (int, "size", pytest.fail.Exception),
    ],
)
def test_a_second_line_a_missing_word_another_error_and_none_are_no_refusal(call, words, error):
    with pytest.raises(error):
        refused(call, "", words)
