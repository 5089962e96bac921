"""A short training run, for comparing implementations."""

import torch

from repa_fast.backend import dispatch
from repa_fast.diffusion.alignment import cosine_losses
from repa_fast.diffusion.flow import velocity_loss
from repa_fast.diffusion.path import linear
from repa_fast.models.sit import SiT
from repa_fast.testing import seeded


def tiny_model():
    """Four tokens of 32 columns, one projector; no layer starts at zero."""
    torch.manual_seed(0)
    model = SiT(
        input_size=4,
        hidden_size=32,
        depth=2,
        num_heads=2,
        encoder_depth=1,
        num_classes=10,
        z_dims=(24,),
        projector_dim=32,
    )
    for layer in (*model.blocks, model.final_layer):
        torch.nn.init.normal_(layer.adaLN_modulation[1].weight, std=0.1)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    return model


def losses(kernels, dtype, steps):
    """The loss of every step, fp64 (steps), with new noise and times at each; autocast to `dtype`.

    kernels: what dispatch.use_kernels takes.
    """
    dispatch.use_kernels(kernels)
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    clean, label, target = (
        seeded((1, 4, 4, 4), seed=1),
        torch.tensor([3]),
        seeded((1, 4, 24), seed=2),
    )
    values = []
    for step in range(steps):
        t = torch.tensor([(0.5 + step * 0.618) % 1])
        noisy, velocity = linear.interpolate(clean, seeded(clean.shape, seed=100 + step), t)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            prediction, projections = model(noisy, t, label)
        align = cosine_losses(projections, [target])[0]
        loss = (velocity_loss(prediction, velocity) + 0.5 * align).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    dispatch.use_kernels(None)
    return torch.tensor(values, dtype=torch.float64)
