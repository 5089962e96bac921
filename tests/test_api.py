"""`import repa_fast`: light, and everything public by name."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import repa_fast
from repa_fast import train
from tests.train.conftest import config_of_run

ROOT = Path(__file__).parents[1]
FRESH = """
import json, sys
import repa_fast
light = set(sys.modules).isdisjoint(("torch", "numpy", "repa_fast.train"))
names = sorted(dir(repa_fast))
{before}
from repa_fast import train
print(json.dumps([light, names, train is repa_fast.train is sys.modules["repa_fast.train"]]))
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


@pytest.mark.parametrize("before", ("", "import repa_fast.train.outputs"))
def test_the_import_is_light_and_train_is_one_thing_whatever_was_imported_first(before):
    script = FRESH.format(before=before)
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{script}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    light, names, same = json.loads(done.stdout)
    assert light and same and set(repa_fast.__all__) <= set(names)


def test_type_checkers_see_the_same_names_in_the_same_modules():
    tree = ast.parse((ROOT / "repa_fast/__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module.removeprefix("repa_fast").lstrip(".")
        for node in block.body
        for alias in node.names
        if alias.asname == alias.name
    }
    assert seen.pop("train") == "train.run"  # which the package is, when called
    assert seen == {name: m for name, m in repa_fast._MODULES.items() if name != "train"}
    assert (ROOT / "repa_fast/py.typed").read_bytes() == b""


def test_the_package_of_training_trains_when_it_is_called(digits_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("repa_fast.train.run.plot_losses", lambda *_: None)  # longer than the step
    folder = train(config_of_run(digits_dir, tmp_path / "one", max_train_steps=1))
    assert folder == tmp_path / "one" and (folder / "checkpoints/0000001/COMPLETE").is_file()
