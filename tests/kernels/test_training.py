"""A tiny model trained by kernels: over many steps, and sharded over processes."""

import functools

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from repa_fast.backend import dispatch
from repa_fast.diffusion.alignment import cosine_losses
from repa_fast.diffusion.flow import velocity_loss
from repa_fast.diffusion.path import linear
from repa_fast.models.sit import SiT
from repa_fast.testing import seeded
from tests.kernels.table import BF16, F32, F64, INTERPRETED
from tests.train.parallel_ranks import ALONE, gradients

STEPS = 50


def tiny_model():
    """Four tokens of 32 columns, one projector; no layer starts at zero."""
    torch.manual_seed(0)
    model = SiT(
        input_size=4, hidden_size=32, depth=2, num_heads=2, encoder_depth=1, num_classes=10,
        z_dims=(24,), projector_dim=32,
    )  # fmt: skip
    for layer in (*model.blocks, model.final_layer):
        torch.nn.init.normal_(layer.adaLN_modulation[1].weight, std=0.1)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    return model


def losses(kernels, dtype):
    """The loss of every step, fp64 (STEPS), with new noise and times at each; autocast to `dtype`.

    kernels: what dispatch.use_kernels takes.
    """
    dispatch.use_kernels(kernels)
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    clean, target = seeded((1, 4, 4, 4), seed=1), seeded((1, 4, 24), seed=2)
    values = []
    for step in range(STEPS):
        t = torch.tensor([(0.5 + step * 0.618) % 1])
        noisy, velocity = linear.interpolate(clean, seeded(clean.shape, seed=100 + step), t)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != F32):
            prediction, projections = model(noisy, t, torch.tensor([3]))
        align = cosine_losses(projections, [target])[0]
        loss = (velocity_loss(prediction, velocity) + 0.5 * align).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    dispatch.use_kernels(None)
    return torch.tensor(values, dtype=F64)


def difference(curve, other):
    """Mean relative difference of two loss curves."""
    return ((curve - other).abs() / other.abs()).mean().item()


@INTERPRETED
@pytest.mark.usefixtures("heavy")
def test_training_with_kernels_stays_as_close_as_bf16_to_fp32(interpreter):
    exact, rounded = (losses("reference", dtype) for dtype in (F32, BF16))
    kernels = interpreter(losses, "triton", BF16)
    assert exact[-10:].mean() < 0.8 * exact[:10].mean()
    assert 0 < difference(kernels, rounded) <= 2 * difference(rounded, exact)
    one_step_late = exact.roll(1)  # other weights are further away
    assert difference(one_step_late, exact) > 2 * difference(rounded, exact)


def mean_loss_gradients(world, kernels, compiled=False, dtype=BF16):
    """{name: gradient} of the mean loss over two samples, shared out among the processes."""
    dispatch.use_kernels(kernels)
    model = tiny_model()
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    if world.size > 1:
        policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=F32, cast_forward_inputs=False)
        shard = functools.partial(fully_shard, mp_policy=policy)
        for block in model.blocks:
            shard(block.adaLN_modulation)  # the model calls it, outside the block
            shard(block)
        shard(model)
    x, t = seeded((2, 4, 4, 4), seed=1), torch.tensor([0.3, 0.8])
    mine = slice(world.rank * 2 // world.size, (world.rank + 1) * 2 // world.size)
    autocast = world.size == 1 and dtype != F32
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        velocity, projections = model(x[mine], t[mine], torch.tensor([1, 2])[mine])
    (velocity.float().square().mean() + projections[0].float().square().mean()).backward()
    dispatch.use_kernels(None)
    return {name: gradient.float() for name, gradient in gradients(model).items()}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.heavy)])
def test_fsdp_on_two_processes_gives_the_gradients_of_one(ranks, can_interpret, compiled):
    first, second = ranks(mean_loss_gradients, "triton", compiled)
    working, exact = (mean_loss_gradients(ALONE, "reference", dtype=dtype) for dtype in (BF16, F32))
    assert first.keys() == exact.keys() and len(exact) > 30
    for name, expected in exact.items():
        band = torch.finfo(BF16).eps / 2 * expected.norm()
        allowed = 2 * (working[name] - expected).norm() + band
        assert 0 < (first[name] - expected).norm() <= allowed, name
        assert torch.equal(first[name], second[name]), name
