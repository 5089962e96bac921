"""The rules of the house, read from the source with ast: layers, circles, sizes, words.

Modules are {name: source}, packages under NAME.__init__, kernels/<op> under repa_fast.kernels.<op>.
"""

import ast
import functools
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = (
    ("__init__", "failure", "whole", "words"),
    ("contracts", "command", "distributed", "ledger", "lock"),
    ("backend",),
    ("kernels",),
    ("ops",),
    ("models", "diffusion", "data"),
    ("encoders",),
    ("configs",),
    ("objective", "prepare"),
    ("configs.config", "configs.file", "configs.presets", "configs.build", "configs.flags"),
    ("checkpoint",),
    ("eval",),
    ("train", "analysis", "share"),
    ("doctor",),
    ("cli", "testing"),
    ("__main__", "benchmarks", "train.py"),
)
"""Rooms, lower to higher; files of a room may have a layer of their own, above or below it: the
parts of a config are below objective, the whole is above. A module imports from its own room and
from lower layers, and from no other room of its own layer but as in BESIDE."""
LEVELS = {room: number for number, layer in enumerate(LAYERS) for room in layer}
BESIDE = {("command", "contracts")}
"""(room, another of its layer that it imports)."""
USE_CLI = {"__main__", "train.py"}
METHODS = {"flow", "ddpm", "repa", "sra"}  # objectives and alignments
KNOW_METHODS = ("configs.presets", "configs.objective", "configs.align", "objective")
OTHER_MEANINGS = {"origin", "to"}
"""Variables in which such a name is one of something else: of a file's writer or format."""
NO_VERB = re.compile(r"(The|An?|Of|What|Whether|As|How|Where|One|All|This|Which)\b")
FILE_LINES, FUNCTION_LINES = 400, 60

Modules = dict[str, str]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def read_modules() -> Modules:
    modules = {"train.py": (ROOT / "train.py").read_text()}
    for folder in ("repa_fast", "kernels", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            name = ".".join(("repa_fast", *parts) if folder == "kernels" else parts)
            modules[name] = file.read_text()
    return modules


@functools.cache
def nodes(source: str) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(source)))


@functools.cache
def written(name: str, source: str) -> tuple[str, ...]:
    """The dotted names that a module imports, anywhere in it: modules, and names in modules.

    What is under `if TYPE_CHECKING` is never run.
    """
    parents, found = name.split(".")[:-1], []
    checked = {
        inner
        for node in nodes(source)
        if isinstance(node, ast.If)
        and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in nodes(source):
        if node in checked:
            continue
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            found += (".".join((*base, alias.name)) for alias in node.names)
    return tuple(found)


def resolved(name: str, dotted: str, modules: Modules) -> Iterator[str]:
    """The modules that run when `name` imports `dotted`: itself, and packages that it is in."""
    parts, own = dotted.split("."), True
    for count in range(len(parts), 0, -1):
        prefix = ".".join(parts[:count])
        found = prefix if prefix in modules else f"{prefix}.__init__"
        # the packages that a module is in itself have begun to run before it
        if found in modules and (own or not name.startswith(f"{prefix}.")):
            yield found
        own = own and found not in modules


def imports(modules: Modules) -> dict[str, set[str]]:
    return {
        name: {found for d in written(name, source) for found in resolved(name, d, modules)}
        - {name}
        for name, source in modules.items()
    }


def room_of(name: str) -> str:
    """The room of LAYERS with the longest name that fits; "" if there is none."""
    inside = name.removeprefix("repa_fast.")
    return max((r for r in LEVELS if f"{inside}.".startswith(f"{r}.")), key=len, default="")


def upward(modules: Modules) -> list[str]:
    """Imports of a higher layer, or of another room of the same one; modules without a room."""
    found = [f"{name} is in no room" for name in modules if not room_of(name)]
    for name, targets in imports(modules).items():
        for target in targets:
            here, there = room_of(name), room_of(target)
            if here and there and (here, there) not in BESIDE:
                same = here.split(".")[0] == there.split(".")[0]
                if LEVELS[there] >= LEVELS[here] + same:
                    found.append(f"{name} imports {target}")
    return sorted(found)


def circle(modules: Modules) -> list[str]:
    """The modules of a circle of imports, if there is any."""
    try:
        graphlib.TopologicalSorter(imports(modules)).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def of_cli(modules: Modules) -> list[str]:
    found = imports(modules).items()
    return [n for n, used in found if "repa_fast.cli" in used and room_of(n) not in USE_CLI]


def foreign(modules: Modules) -> list[str]:
    """Imports of what an installed package does not have, and of kernels under a second name."""
    return sorted(
        f"{name} imports {dotted}"
        for name, source in modules.items()
        for dotted in written(name, source)
        if (dotted.split(".")[0] in ("benchmarks", "tests") and name.startswith("repa_fast."))
        or dotted.split(".")[0] == "kernels"
    )


def of_kernels(modules: Modules) -> list[str]:
    """Imports of kernels from elsewhere in repa_fast than ops, or from a sibling op."""

    def op(name: str) -> str:
        return name.split(".")[2] if name.startswith("repa_fast.kernels.") else ""

    return sorted(
        f"{name} imports {target}"
        for name, targets in imports(modules).items()
        for target in targets
        if op(target) not in ("", "__init__", op(name))
        and name.startswith("repa_fast.")
        and name != "repa_fast.ops"
    )


def functions(modules: Modules) -> Iterator[tuple[str, Function]]:
    for name, source in modules.items():
        for node in nodes(source):
            if isinstance(node, Function):
                yield f"{name}:{node.lineno} {node.name}", node


def decorators(function: Function) -> set[str]:
    return {ast.unparse(d).split("(")[0].rpartition(".")[2] for d in function.decorator_list}


def too_long(modules: Modules) -> list[str]:
    found = {name: len(source.splitlines()) for name, source in modules.items()}
    found = {name: lines for name, lines in found.items() if lines > FILE_LINES}
    for name, node in functions(modules):
        lines = node.end_lineno - node.lineno + 1
        the_loop = name.startswith("repa_fast.train.loop:") and node.name == "loop"
        if lines > FUNCTION_LINES and "jit" not in decorators(node) and not the_loop:
            found[name] = lines
    return [f"{name} has {lines} lines" for name, lines in sorted(found.items())]


def compared(node: ast.AST) -> list[ast.expr]:
    """What is compared in a node, with the elements of tuples, lists and sets; or matched."""
    if isinstance(node, ast.MatchValue):
        return [node.value]
    sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
    return [part for side in sides for part in [side, *getattr(side, "elts", ())]]


def method_names(modules: Modules) -> list[str]:
    """Comparisons with the name of an objective or an alignment, where none need be known."""
    found = []
    for name, source in modules.items():
        inside = f"{name.removeprefix('repa_fast.')}."
        if any(inside.startswith(f"{place}.") for place in KNOW_METHODS):
            continue
        for node in nodes(source):
            sides = compared(node)
            constants = {side.value for side in sides if isinstance(side, ast.Constant)}
            others = {ast.unparse(side).rpartition(".")[2] for side in sides}
            if constants & METHODS and not others & OTHER_MEANINGS:
                found.append(f"{name}:{node.lineno} {ast.unparse(node)}")
    return sorted(found)


def no_verb(modules: Modules) -> list[str]:
    """Functions whose docstrings start with what is no verb; properties may be noun phrases."""
    found = []
    for name, node in functions(modules):
        text = ast.get_docstring(node) or ""
        if NO_VERB.match(text) and not decorators(node) & {"property", "cached_property"}:
            found.append(f"{name}: {text.splitlines()[0]}")
    return found


RULES = (upward, circle, of_cli, foreign, of_kernels, too_long, method_names, no_verb)
PLANTED = (
    (upward, "repa_fast.data.order", "def f():\n    from repa_fast.encoders import load"),
    (upward, "repa_fast.models.sit", "from ..diffusion import path"),
    (upward, "repa_fast.attic.box", ""),
    (circle, "repa_fast.contracts", "import repa_fast.backend.dispatch"),
    (circle, "repa_fast.encoders.vit", "from repa_fast.encoders import load"),
    (of_cli, "repa_fast.eval.generate", "from repa_fast import cli"),
    (upward, "repa_fast.configs.model", "import repa_fast.configs.config"),
    (foreign, "repa_fast.ops", "from tests import optional"),
    (foreign, "benchmarks.kernels.ops", "import kernels.adaln"),
    (of_kernels, "repa_fast.models.sit", "from repa_fast.kernels.adaln import op"),
    (of_kernels, "repa_fast.kernels.adaln.op", "from repa_fast.kernels import align_loss"),
    (too_long, "repa_fast.ops", "\n" * FILE_LINES + "pass"),
    (too_long, "repa_fast.ops", "def f():" + "\n" * FUNCTION_LINES + "    pass"),
    (method_names, "repa_fast.cli", "config.align in ('sra', 'repa')"),
    (no_verb, "repa_fast.ops", "def f():\n    '''The function.'''"),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule):
    found = rule(read_modules())
    assert not found, f"{rule.__doc__ or ''}\n" + "\n".join(found)


@pytest.mark.parametrize("rule, name, source", PLANTED, ids=range(len(PLANTED)))
def test_a_planted_fault_is_found(rule, name, source):
    sound = dict.fromkeys(read_modules(), "")
    sound["repa_fast.encoders.__init__"] = "from repa_fast.encoders.vit import load"
    sound["repa_fast.backend.dispatch"] = "import repa_fast.contracts"
    assert not rule(sound)
    assert rule(sound | {name: source})


def test_what_type_checkers_read_alone_is_no_import():
    source = "if TYPE_CHECKING:\n    from repa_fast import cli\nelse:\n    import os\nimport re"
    assert written("repa_fast.ops", source) == ("re", "os")
    runs = source.replace("if T", "if not T")
    assert written("repa_fast.ops", runs) == ("re", "repa_fast.cli", "os")


def test_kernels_and_the_loop_may_be_long():
    loop = "def loop():" + "\n" * FUNCTION_LINES + "    pass"
    assert not too_long({"repa_fast.kernels.adaln.triton_kernels": f"@triton.jit\n{loop}"})
    assert not too_long({"repa_fast.train.loop": loop})
    assert too_long({"repa_fast.train.run": loop})
