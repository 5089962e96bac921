"""A model as samplers call it: classifier-free guidance, and velocities of what it predicts."""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from repa_fast.contracts import expect_shape
from repa_fast.diffusion.path import Path, linear
from repa_fast.diffusion.prediction import to_velocity

Outputs = tuple[Tensor, Tensor | None]
"""What a model gives for the labels, and for the null label; None without guidance."""


@dataclass(eq=False)
class Guided:
    """A model under classifier-free guidance; its arguments are those of every sampler.

    Args:
        model: in eval mode; model(x, t, y) -> output or (output, ...), t (B) int64 for integer t,
            else fp32 at least; has `num_classes` for guidance.
        latents: (B, C, h, w), standard normal noise; its dtype is the model's.
        labels: (B), int64 classes.
        cfg_scale: guidance scale s, null + s (conditional - null); 1 is none.
        guidance_channels: guide this many leading channels, the others follow the conditional
            output; None for all. SiT and DiT guide 3.
        state_dtype: fp64 or fp32, in which the state is kept and advanced.

    Raises:
        ValueError: labels out of range or of another batch size, guidance of a model without null
            label, or channels that the latents do not have.
    """

    model: torch.nn.Module
    latents: Tensor
    labels: Tensor
    _: KW_ONLY
    cfg_scale: float = 1.0
    guidance_channels: int | None = None
    state_dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        expect_shape("sampler", "labels", self.labels, self.latents.shape[:1])
        self.num_classes = getattr(self.model, "num_classes", None)
        check_guidance(self)

    def outputs(self, x: Tensor, t: float, guided: bool = True) -> Outputs:
        """Call the model once, with the labels and under guidance without, on x (B, C, h, w)."""
        guided, y = guided and self.cfg_scale != 1.0, self.labels
        if guided:
            x, y = torch.cat([x, x]), torch.cat([y, torch.full_like(y, self.num_classes)])
        # fp32 at least: bf16 would leave 8 bits of t
        dtype = torch.int64 if isinstance(t, int) else torch.promote_types(x.dtype, torch.float32)
        output = self.model(x, torch.full((len(x),), t, dtype=dtype, device=x.device), y)
        output = output if isinstance(output, Tensor) else output[0]
        if not guided:
            return output, None
        conditional, null = output.chunk(2)
        if self.guidance_channels is not None:
            rest = conditional[:, self.guidance_channels :]
            null = torch.cat([null[:, : self.guidance_channels], rest], dim=1)
        return conditional, null

    def mix(self, conditional: Tensor, null: Tensor | None) -> Tensor:
        """Return null + s (conditional - null) in `state_dtype`; without null, the conditional."""
        conditional = conditional.to(self.state_dtype)
        if null is None:
            return conditional
        null = null.to(self.state_dtype)
        return null + self.cfg_scale * (conditional - null)


@dataclass(eq=False)
class Field(Guided):
    """The velocities of a guided model; its further arguments are those of every flow sampler.

    Args:
        guidance_interval: guidance acts while low <= t <= high (t at the start of the step).
        path: turns a score or noise into a velocity, and says where the ODE stops: t = 0, on the
            VP path 0.001.
        prediction: of the model: "v", or "score" or "noise", which are integrated from 0.999 (on
            the VP path from 1) to 0.001.
    """

    _: KW_ONLY
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    path: Path = linear
    prediction: str = "v"

    def velocities(self, state: Tensor, copy: Tensor, t: float, t_guidance: float) -> Outputs:
        """Call the model once, on a copy of the state; `t_guidance` decides on guidance.

        A velocity has the dtype of the model's output; one made of a score or noise the state's.
        """
        low, high = self.guidance_interval
        conditional, null = self.outputs(copy, t, low <= t_guidance <= high)
        null = None if null is None else self._velocity(null, state, t)
        return self._velocity(conditional, state, t), null

    def _velocity(self, output: Tensor, state: Tensor, t: float) -> Tensor:
        if self.prediction == "v":
            return output
        time = torch.tensor(t, dtype=torch.float64)
        return to_velocity(self.prediction, output.to(state.dtype), state, time, self.path)


def check_guidance(guided: Guided) -> None:
    """Raise ValueError where labels, null label or guided channels cannot be."""
    num_classes, channels = guided.num_classes, guided.guidance_channels
    if num_classes is not None and guided.labels.numel():
        low, high = int(guided.labels.min()), int(guided.labels.max())
        if low < 0 or high > num_classes:
            raise ValueError(f"labels lie in [{low}, {high}], expected [0, {num_classes}]")
    if guided.cfg_scale != 1.0 and num_classes is None:
        raise ValueError("guidance needs the null label: the model has no attribute num_classes")
    if channels is not None and not 1 <= channels <= guided.latents.shape[1]:
        raise ValueError(
            f"guidance_channels is {channels}, expected None or 1 to {guided.latents.shape[1]}"
        )
