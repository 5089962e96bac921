"""What training takes from inside torch is there, and does what its public twin does."""

import torch

from repa_fast.train import torch_private


def stepped(skip: float) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """Return a parameter after torch's own AdamW step, and after ours under `skip`."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    ours.grad = theirs.grad = torch.randn(5)
    torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.2, fused=True).step()
    torch_private.fused_adamw(
        [ours.detach()],
        [ours.grad],
        [torch.zeros(5)],
        [torch.zeros(5)],
        [torch.zeros(())],
        skip=torch.tensor(skip),
        grad_scale=torch.tensor(1.0),
        lr=torch.tensor(0.1),
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.2,
    )
    return theirs, ours


def test_the_fused_step_is_adamws():
    theirs, ours = stepped(skip=0.0)
    assert torch.equal(theirs, ours)


def test_a_skipped_step_changes_nothing():
    _, ours = stepped(skip=1.0)
    assert torch.equal(ours, torch.ones(5))


def test_the_scale_is_the_scalers():
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    scaler.scale(torch.zeros(1))
    assert torch_private.scale_of(scaler).item() == scaler.get_scale() == 512


def test_a_recorded_overflow_is_what_unscale_would_have_found():
    scalers = [torch.amp.GradScaler("cpu", init_scale=512.0) for _ in range(2)]
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), float("inf"))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for scaler in scalers:
        scaler.scale(torch.zeros(1))
    scalers[0].unscale_(optimizer)
    torch_private.record_overflow(scalers[1], optimizer, torch.tensor(1.0))
    for scaler in scalers:
        scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale() == 256
