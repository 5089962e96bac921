"""Two processes: going back together, and who is to blame."""

import json

import pytest
import torch

pytest.importorskip("lance")

from repa_fast.data.order import SampleOrder
from repa_fast.prepare.images import prepare_digits
from repa_fast.train.spikes import History
from tests.train.launching import torchrun
from tests.train.watch_ranks import TIMEOUT

pytestmark = pytest.mark.xdist_group("distributed")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """(torchrun's stderr, folder of what the processes left)."""
    folder = tmp_path_factory.mktemp("ranks")
    digits = str(prepare_digits(folder / "digits"))
    process = torchrun("tests.train.watch_ranks", 2, OUT=str(folder), DIGITS=digits)
    assert process.returncode == 1, process.stderr
    return process.stderr, folder


def test_both_go_back_together_and_take_their_share_of_later_data(ended):
    found = [torch.load(ended[1] / f"back.{rank}", weights_only=False) for rank in range(2)]
    order = SampleOrder(1500, 12, seed=0)
    for rank, process in enumerate(found):
        assert process["history"] == found[0]["history"]
        assert isinstance(process["history"], History)
        assert (process["history"].rollbacks, process["history"].skipped) == (1, 4)
        expected = [(s, s) for s in range(19)] + [(s, s + 4) for s in range(15, 24)]
        assert [seen[:2] for seen in process["seen"]] == expected
        for _, data, rows in process["seen"]:
            assert rows == order.rows(data, rank, 2).tolist()
    for name, value in found[0]["weights"].items():
        assert torch.equal(value, found[1]["weights"][name]), name


def test_a_process_does_not_wait_for_ever(ended):
    """Nor do those who give up and those who came late disturb the session after theirs."""
    waited = json.loads((ended[1] / "waiting.0").read_text())
    assert TIMEOUT <= waited["seconds"] < 2 * TIMEOUT + 30
    assert f"{1000 * TIMEOUT:.0f}ms" in waited["message"]


def test_torchrun_names_the_process_that_failed_first(ended):
    stderr, _ = ended
    cause = stderr[stderr.index("Root Cause (first observed failure)") :]
    assert "rank      : 1 (local_rank: 1)" in cause
    assert "a GPU fell off the bus" in cause and "in step" in cause


def test_each_process_leaves_its_error(ended):
    logs = ended[1] / "fails" / "logs"
    first, second = ((logs / f"error-rank{rank}.txt").read_text() for rank in (1, 0))
    assert "RuntimeError: a GPU fell off the bus" in first and "after" not in first.split("\n")[0]
    assert second.split("\n")[0].endswith("after error-rank1.txt")
