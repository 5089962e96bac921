"""A model as samplers call it: classifier-free guidance, and velocities of what it predicts."""

from collections.abc import Callable

import torch

from repa_fast.contracts import expect_shape
from repa_fast.diffusion.path import Path
from repa_fast.diffusion.prediction import to_velocity

Velocities = Callable[
    [torch.Tensor, torch.Tensor, float, float], tuple[torch.Tensor, torch.Tensor | None]
]
"""(state, its copy for the model, t, the t that decides on guidance) -> (conditional velocity,
unconditional velocity or None without guidance)."""


def guided_outputs(
    model: torch.nn.Module,
    latents: torch.Tensor,
    labels: torch.Tensor,
    cfg_scale: float,
    guidance_channels: int | None,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """Return a function that calls a model once, with the labels and under guidance without.

    It takes x (B, C, h, w), t and `guided`, true by default, and returns the output for the labels
    and that for the null label, None without guidance. Channels beyond `guidance_channels` are in
    both those for the labels. Integer t are int64, others fp32 at least: bf16 would leave 8 bits.

    Arguments and errors as for `guided_velocities`.
    """
    expect_shape("sampler", "labels", labels, latents.shape[:1])
    num_classes = getattr(model, "num_classes", None)
    check_guidance(labels, num_classes, cfg_scale, guidance_channels, latents.shape[1])

    def outputs(
        x: torch.Tensor, t: float, guided: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        guided, y = guided and cfg_scale != 1.0, labels
        if guided:
            x, y = torch.cat([x, x]), torch.cat([y, torch.full_like(y, num_classes)])
        dtype = torch.int64 if isinstance(t, int) else torch.promote_types(x.dtype, torch.float32)
        output = model(x, torch.full((len(x),), t, dtype=dtype, device=x.device), y)
        output = output if isinstance(output, torch.Tensor) else output[0]
        if not guided:
            return output, None
        conditional, null = output.chunk(2)
        if guidance_channels is not None:
            rest = conditional[:, guidance_channels:]
            null = torch.cat([null[:, :guidance_channels], rest], dim=1)
        return conditional, null

    return outputs


def mix(
    conditional: torch.Tensor, null: torch.Tensor | None, cfg_scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """Return null + cfg_scale (conditional - null) in `dtype`; without null, the conditional."""
    conditional = conditional.to(dtype)
    if null is None:
        return conditional
    null = null.to(dtype)
    return null + cfg_scale * (conditional - null)


def guided_velocities(
    model: torch.nn.Module,
    latents: torch.Tensor,
    labels: torch.Tensor,
    cfg_scale: float,
    guidance_interval: tuple[float, float],
    guidance_channels: int | None,
    path: Path,
    prediction: str,
) -> Velocities:
    """Return the velocities of a model, one call of it for both.

    A velocity has the dtype of the model's output; one made of a score or noise has the state's.

    Args:
        model, labels, cfg_scale, guidance_interval, guidance_channels, prediction: as for
            `repa_fast.diffusion.samplers.euler`.
        latents: (B, C, h, w), for the shape.
        path: of the score or noise.

    Raises:
        ValueError: labels out of range or of another batch size, guidance of a model without null
            label, or channels that the latents do not have.
    """
    outputs = guided_outputs(model, latents, labels, cfg_scale, guidance_channels)
    low_t, high_t = guidance_interval

    def velocity(output: torch.Tensor, state: torch.Tensor, t: float) -> torch.Tensor:
        if prediction == "v":
            return output
        time = torch.tensor(t, dtype=torch.float64)
        return to_velocity(prediction, output.to(state.dtype), state, time, path)

    def velocities(
        state: torch.Tensor, copy: torch.Tensor, t: float, t_guidance: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        conditional, null = outputs(copy, t, low_t <= t_guidance <= high_t)
        null = None if null is None else velocity(null, state, t)
        return velocity(conditional, state, t), null

    return velocities


def check_guidance(
    labels: torch.Tensor,
    num_classes: int | None,
    cfg_scale: float,
    guidance_channels: int | None,
    channels: int,
) -> None:
    """Raise ValueError where labels, null label or guided channels cannot be."""
    if num_classes is not None and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high > num_classes:
            raise ValueError(f"labels lie in [{low}, {high}], expected [0, {num_classes}]")
    if cfg_scale != 1.0 and num_classes is None:
        raise ValueError("guidance needs the null label: the model has no attribute num_classes")
    if guidance_channels is not None and not 1 <= guidance_channels <= channels:
        raise ValueError(
            f"guidance_channels is {guidance_channels}, expected None or 1 to {channels}"
        )
