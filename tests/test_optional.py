"""Absent packages skip their tests only, in a pytest of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFTEST = """
from tests import optional
optional.ABSENT = optional.absent(("no_such_package", "os.no_such_part", "math"))
from tests.optional import *
"""
FILES = {
    "test_module.py": "import no_such_package.part\ndef test_a(): pass",
    "test_inside.py": "def test_b(): import no_such_package\ndef test_c(): pass",
    "test_fixture.py": """
import pytest
@pytest.fixture
def thing():
    from no_such_package import thing
def test_d(thing): pass
""",
    "test_part.py": "import os.no_such_part",
}
WRONG = (
    "import no_such_package_of_ours",
    "import tests.no_such_module",
    "from os import no_such_name",
    "import math.no_such_part",
    "raise ValueError",
    "def test_e(): import tests.no_such_module",
)


def test_what_needs_an_absent_package_is_skipped_and_other_errors_are_errors(tmp_path):
    files = FILES | {f"test_{number}.py": text for number, text in enumerate(WRONG)}
    files |= {"conftest.py": CONFTEST}
    files |= {"pytest.ini": "[pytest]\naddopts = --import-mode=importlib\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    flags = "-rs --continue-on-collection-errors -p no:cacheprovider -c pytest.ini ."
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", *flags.split()]
    said = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True
    ).stdout
    assert "1 failed, 1 passed, 4 skipped, 5 errors" in said, said
    assert "[1] test_module.py:1: needs no_such_package" in said
    assert "[1] test_part.py:1: needs os.no_such_part" in said
    assert "[2] " in said and said.count(": needs no_such_package") == 2
