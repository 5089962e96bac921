"""The notebook runs from its first cell to its last, on few images and steps."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("lance")

NOTEBOOK = Path(__file__).parents[1] / "examples" / "own_images.ipynb"
FEWER = {"STEPS": "12", "OWN_STEPS": "60"}


def notebook():
    read = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(read)
    return read


def sources(of) -> list[str]:
    return [cell.source for cell in of.cells if cell.cell_type == "code"]


def test_it_is_whole_as_committed_with_pictures_and_without_errors():
    read = notebook()
    outputs = [out for cell in read.cells if cell.cell_type == "code" for out in cell.outputs]
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 4
    assert not [out for out in outputs if out.output_type == "error"]
    for source in sources(read):
        compile(source, NOTEBOOK.name, "exec")
    text = NOTEBOOK.read_text()
    assert not [path for path in (NOTEBOOK.parents[1], Path.home()) if f"{path}/" in text]
    assert len(text) < 600_000


@pytest.mark.usefixtures("heavy")
def test_every_cell_runs(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    read = notebook()
    first = next(cell for cell in read.cells if cell.cell_type == "code")
    for name, value in FEWER.items():
        first.source, found = re.subn(rf"(?m)^{name} = \d+", f"{name} = {value}", first.source)
        assert found == 1
    NotebookClient(read, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "exps/photos/checkpoints/0000012/COMPLETE").is_file()
    assert (tmp_path / "shared/README.md").is_file()
    assert len(list(tmp_path.glob("photos/*/*.jpg"))) == 80
    cell = next(cell for cell in reversed(read.cells) if cell.cell_type == "code")
    assert any("image/png" in out.get("data", {}) for out in cell.outputs)
