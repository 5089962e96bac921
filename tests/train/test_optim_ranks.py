"""AdamWEMA on shards."""

import pytest

from tests.train.optim_ranks import MAX_NORM, steps
from tests.train.parallel_ranks import ALONE


@pytest.mark.parametrize("ema_warmup", (False, True))
def test_fsdp_on_two_processes_equals_one(ranks, ema_warmup):
    both, expected = ranks(steps, ema_warmup), steps(ALONE, ema_warmup)
    assert [int(found.pop("empty shards")) for found in both] == [0, 2]
    del expected["empty shards"]
    assert 0 < (expected["norms"] > MAX_NORM).sum() < len(expected["norms"])
    for found in both:
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            difference = (found[name] - values).norm()
            assert difference <= 1e-6 * values.norm(), name
    assert expected["0.weight.step"].item() == len(expected["norms"]) - 1
