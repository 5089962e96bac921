"""What this room shares: images whose class is their colour, and a run on them."""

import pytest

from repa_fast.eval.load import load
from tests.analysis.analysing import TRAIN, VAL, coloured, write_table
from tests.eval import checkpoints


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of two tables, the images of `coloured(TRAIN, 0)` and `coloured(VAL, 1)`."""
    folder = tmp_path_factory.mktemp("data")
    write_table(folder / "train.lance", *coloured(TRAIN, seed=0))
    write_table(folder / "val.lance", *coloured(VAL, seed=1))
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory, data):
    """A run of the digits' sizes that says it was trained on the colours."""
    return checkpoints.run(tmp_path_factory.mktemp("run"), steps=(3, 7), data_dir=str(data))


@pytest.fixture(scope="session")
def loaded(run):
    return load(run)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where features are kept, so that no two tests compute the same."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def fields(run, cache, tmp_path):
    """Of an analysis of the run, whose results are written to OUT."""
    return {"ckpt": str(run), "cache": cache, "out": str(tmp_path / "out"), "num_workers": 1}


@pytest.fixture
def undrawn(monkeypatch):
    """Spare the pictures, which take longer than all else."""
    monkeypatch.setattr("repa_fast.analysis.probe.plot", lambda *_: None)
    monkeypatch.setattr("repa_fast.analysis.similarity._plot", lambda *_: None)
