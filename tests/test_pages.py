"""What the pages name is there: modules to run with -m, and files of the repository."""

import ast
import re
from pathlib import Path

import pytest

from tests.test_house import LAYERS

ROOT = Path(__file__).parents[1]
PATTERNS = (
    "README.md",
    "CONTRIBUTING.md",
    "Makefile",
    "docs/**/*.md",
    "docs/launch/*",
    "kernels/*/README.md",
    "csrc/**/README.md",
    "repa_fast/**/README.md",
)
HISTORY = {"docs/LOG.md"}
THIRD_PARTY = {"mkdocs", "pytest", "pip", "venv"}
FILE = re.compile(
    r"(?<![\w./-])(?:repa_fast|benchmarks|kernels|tests|docs|csrc)/[\w./-]+\.(?:py|md)"
)
PAGES = sorted({str(f.relative_to(ROOT)) for p in PATTERNS for f in ROOT.glob(p)} - HISTORY)


def modules_in(text: str) -> set[str]:
    """The NAMEs of `-m NAME`, without pytest's -m, which chooses tests."""
    found = set()
    for match in re.finditer(r"(?<!\S)-m\s+([A-Za-z_][\w.]*\w)", text):
        command = re.split(r"[`\n]", text[: match.start()])[-1]
        if "pytest" not in command:
            found.add(match[1])
    return found - THIRD_PARTY


def runs(module: str) -> bool:
    """Whether there is such a file with a `__main__` block, or such a package with __main__.py."""
    path = ROOT / module.removeprefix("repa_fast.").replace(".", "/")
    if not module.startswith("repa_fast.kernels."):
        path = ROOT / module.replace(".", "/")
    if (path / "__main__.py").is_file():
        return True
    file = path.with_suffix(".py")
    if not file.is_file():
        return False
    blocks = (node for node in ast.parse(file.read_text()).body if isinstance(node, ast.If))
    return any(ast.unparse(block.test) == "__name__ == '__main__'" for block in blocks)


def test_there_are_pages_which_name_modules_and_a_name_that_is_stale_is_found():
    texts = [(ROOT / page).read_text() for page in PAGES]
    assert {"README.md", "Makefile", "docs/clusters.md", "kernels/adaln/README.md"} < set(PAGES)
    assert {"repa_fast", "benchmarks.gpu"} < set.union(*map(modules_in, texts))
    text = "`.venv/bin/python -m pytest -m gpu`, `torchrun -m repa_fast.eval.attic`"
    assert modules_in(text) == {"repa_fast.eval.attic"} and not runs("repa_fast.eval.attic")
    assert not runs("repa_fast.ops") and not runs("repa_fast.eval") and runs("repa_fast")
    text = "`tests/a.py`, (docs/b.md) x/docs/c.md repa_fast/d/"
    assert FILE.findall(text) == ["tests/a.py", "docs/b.md"]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    text = (ROOT / page).read_text()
    stale = [f"-m {module}" for module in sorted(modules_in(text)) if not runs(module)]
    stale += [file for file in sorted(set(FILE.findall(text))) if not (ROOT / file).is_file()]
    assert not stale, f"{page} names {', '.join(stale)}"


def section(title: str) -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_way_of_a_batch_goes_through_files_that_are_there():
    way = section("Which way a batch goes")
    named = re.findall(r"`([\w/.]+)`", way)
    assert len(named) > 25
    assert not [name for name in named if not (ROOT / "repa_fast" / name).exists()]


def test_the_layers_are_those_of_the_house():
    lines = section("Where things go").split("```\n")[1].splitlines()
    house = [[room for room in layer if room != "__init__"] for layer in LAYERS[:-1]]
    assert [line.split(", ") for line in lines] == house
