"""Gradient scalers, which training reads and tells of overflows by names inside torch.

The fused AdamW, which it takes from there too, is compared with torch's in test_optim.py.
"""

import math

import torch

from repa_fast.train.torch_private import record_overflow, scale_of
from tests.train.adamw import flat, give_gradients, make_parameters, our_adamw, torch_adamw
from tests.train.conftest import assert_same


def test_overflow_halves_the_scale_and_good_steps_grow_it_as_torchs_own_do():
    both = [make_parameters() for _ in range(2)]
    ours, other = our_adamw(both[0], weight_decay=0.1), torch_adamw(both[1])
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3) for _ in range(2)]
    overflows, seen = {2, 3, 9, 14}, []
    for step in range(18):
        for params, scaler in zip(both, scalers, strict=True):
            scale = scaler.scale(torch.ones(()))
            give_gradients(params, step)
            torch._foreach_mul_([p.grad for p in params if p.grad is not None], scale)
            if step in overflows:
                params[2].grad[5] = math.inf if step % 2 else math.nan
        norm = ours.gradient_norm()
        bad = 1 - torch.isfinite(norm).float()
        ours.step(grad_scale=scale_of(scalers[0]).reciprocal(), skip=bad)
        record_overflow(scalers[0], ours, bad)
        scalers[1].unscale_(other)
        scalers[1].step(other)
        assert scale_of(scalers[0]).item() == scalers[0].get_scale()
        for scaler in scalers:
            scaler.update()
        a, b = (scaler.state_dict() for scaler in scalers)
        assert a == b
        seen.append(a["scale"])
        torch.testing.assert_close(*map(flat, both), rtol=1e-6, atol=1e-6)
    assert min(seen) == 2.0 and max(seen) >= 8.0 and len(set(seen)) >= 3
    assert ours.state[both[0][1]]["step"].item() == 14


def test_gradient_scalers_own_step_is_honoured():
    """torch's fused AdamW, whose subclass this is, takes scale and overflow from the scaler."""
    params = make_parameters()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    give_gradients(params, 0)
    params[1].grad[0, 0] = math.inf
    scaler.step(our_adamw(params))
    assert_same(params, make_parameters())
