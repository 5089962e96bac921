"""Data sets that no test changes, and the pipelines of DALI that tests have built."""

import weakref

import pytest

from repa_fast.data import dali
from repa_fast.data.dali import DaliDecoder
from tests.data.encoding import write_table


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """COUNT rows, PNG and JPEG in turn."""
    pytest.importorskip("lance")
    return write_table(tmp_path_factory.mktemp("table") / "train.lance")


@pytest.fixture(scope="session")
def with_dali():
    if reason := dali.why_not(gpu=False):
        pytest.skip(reason)


@pytest.fixture
def built(monkeypatch):
    """Weak references to the pipelines of DALI that were built."""
    pipelines, build = [], DaliDecoder._build

    def noted(self, batch):
        pipeline = build(self, batch)
        pipelines.append(weakref.ref(pipeline))
        return pipeline

    monkeypatch.setattr(DaliDecoder, "_build", noted)
    return pipelines
