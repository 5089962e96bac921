"""What training takes from inside torch is there, and does what its public twin does."""

import torch

from repa_fast.train import torch_private


def test_the_fused_step_is_adamws_and_nothing_under_skip():
    torch.manual_seed(0)
    theirs, gradient = torch.nn.Parameter(torch.ones(5)), torch.randn(5)
    theirs.grad = gradient.clone()
    torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.2, fused=True).step()
    options = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.2}
    options |= {"lr": torch.tensor(0.1), "grad_scale": torch.tensor(1.0)}
    for skip, expected in ((0.0, theirs.detach()), (1.0, torch.ones(5))):
        ours, moments = torch.ones(5), [[torch.zeros(5)] for _ in range(2)]
        torch_private.fused_adamw(
            [ours], [gradient], *moments, [torch.zeros(())], skip=torch.tensor(skip), **options
        )
        assert torch.equal(ours, expected)


def test_scale_and_overflow_are_the_scalers():
    """What is recorded as an overflow is what unscale_ would have found."""
    scalers = [torch.amp.GradScaler("cpu", init_scale=512.0) for _ in range(2)]
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), float("inf"))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for scaler in scalers:
        scaler.scale(torch.zeros(1))
        assert torch_private.scale_of(scaler).item() == scaler.get_scale() == 512
    scalers[0].unscale_(optimizer)
    torch_private.record_overflow(scalers[1], optimizer, torch.tensor(1.0))
    for scaler in scalers:
        scaler.update()
        assert scaler.get_scale() == 256
