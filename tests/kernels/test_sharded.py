import pytest
import torch

from tests.kernels.sharded import mean_loss_gradients, sharded
from tests.train.parallel_ranks import ALONE


@pytest.mark.parametrize("compiled", [pytest.param(False, marks=pytest.mark.heavy), True])
def test_fsdp_on_two_processes_gives_the_gradients_of_one(ranks, can_interpret, compiled):
    first, second = ranks(sharded, compiled)
    working, exact = (
        mean_loss_gradients(ALONE, "reference", dtype=dtype)
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert first.keys() == exact.keys() and len(exact) > 30
    for name, expected in exact.items():
        band = torch.finfo(torch.bfloat16).eps / 2 * expected.norm()
        allowed = 2 * (working[name] - expected).norm() + band
        assert 0 < (first[name] - expected).norm() <= allowed, name
        assert torch.equal(first[name], second[name]), name
