"""`import repa_fast`: light, and everything public by name."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import repa_fast

ROOT = Path(__file__).parents[1]
FRESH = """
import json, sys
import repa_fast
light = set(sys.modules).isdisjoint(("torch", "numpy", "repa_fast.ops"))
names = sorted(dir(repa_fast))
print(json.dumps([light, names]))
"""


@pytest.mark.parametrize("name", repa_fast.__all__)
def test_a_public_name_resolves_and_is_described(name):
    found = getattr(repa_fast, name)
    assert name in dir(repa_fast)
    if name != "__version__":
        assert found.__doc__.splitlines()[0].endswith((".", ";", ",")), found.__doc__


def test_an_unknown_name_is_refused_in_the_usual_words():
    with pytest.raises(AttributeError) as caught:
        repa_fast.SIT  # noqa: B018
    assert str(caught.value) == "module 'repa_fast' has no attribute 'SIT'"
    with pytest.raises(ImportError, match="cannot import name 'SIT' from 'repa_fast'"):
        from repa_fast import SIT  # noqa: F401


def test_the_import_is_light():
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{FRESH}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    light, names = json.loads(done.stdout)
    assert light and set(repa_fast.__all__) <= set(names)


def test_type_checkers_and_tools_see_the_same_names_in_the_same_modules():
    tree = ast.parse((ROOT / "repa_fast/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module.removeprefix("repa_fast").lstrip(".")
        for node in block.body
        for alias in node.names
        if alias.asname == alias.name
    }
    assert seen == repa_fast._MODULES
    assert set(repa_fast.__all__) == {"__version__", *seen}
    assert (ROOT / "repa_fast/py.typed").read_bytes() == b""
