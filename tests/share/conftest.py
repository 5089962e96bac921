"""A run with samples and scores, and a hub that answers on this machine."""

import pytest

from tests.eval import checkpoints
from tests.eval.conftest import same_precision  # noqa: F401 - a fixture
from tests.share.hub import serving


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The folder of a tiny run on digits, of step 7."""
    return checkpoints.run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A local hub that the client of this process talks to, with a cache of its own."""
    from huggingface_hub import constants

    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        yield hub
