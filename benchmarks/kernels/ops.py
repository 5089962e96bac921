"""What is measured: every op with its shapes, dtypes, inputs and necessary bytes.

Shape letters: B batch, N tokens, D width, H heads, K head dim.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from repa_fast import ops
from repa_fast.diffusion import path
from repa_fast.kernels.euler_maruyama_step.reference import (
    euler_maruyama_step_reference,
    standard_normal,
)

BRANCH = torch.bfloat16  # compute dtype: branches, modulation, projections, velocities
MODES = ("backward", "forward", "both")
VECTORS = ("gate", "shift", "scale")  # (B, D) chunks of one (B, 6 D) tensor, as in a block
STEP = {"t": 0.5, "dt": -0.004, "path": path.linear, "diffusion": 1.0, "cfg_scale": 1.5, "seed": 7}
COEFFICIENTS = tuple(
    c.item() for c in path.linear.coefficients(torch.tensor(STEP["t"], dtype=torch.float64))
)

Shape = tuple[int, ...]
Tensors = dict[str, torch.Tensor]
Describe = Callable[[Shape, torch.dtype], Tensors]


def meta(shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of this shape and dtype, without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Case:
    """One op; each function of (shape, dtype) returns tensors on the meta device, by name."""

    op: str
    call: Callable  # takes implementation=, but for attention, which takes backend=
    inputs: Describe
    outputs: Describe
    saved: tuple[str, ...] = ()  # arguments and results that a backward pass has to read again
    gradients: tuple[str, ...] = ()  # arguments that get one; none: there is no backward pass
    in_place: tuple[str, ...] = ()  # those of `gradients` that are the upstream gradient itself
    shapes: tuple[Shape, ...] = ((32, 256, 1152), (256, 256, 1152))  # SiT-XL/2 at 256 x 256
    small: Shape = (4, 64, 384)  # for a CPU
    tiny: Shape = (1, 1, 8)  # its device time does not matter, for the host's
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)  # of the stream, state or q
    plain: Callable | None = None  # the same for torch.compile, if `call` is not traceable
    options: Mapping[str, Any] = field(default_factory=dict)  # further arguments
    flops: Callable[[Shape, str], int] = lambda shape, mode: 0  # of ops that are not memory alone

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.gradients else ("forward",)

    def reference(self, **tensors: torch.Tensor) -> Any:
        """Compute the specification, at the precision of `tensors`."""
        chosen = "backend" if self.op == "attention" else "implementation"
        return self.call(**tensors, **self.options, **{chosen: "reference"})


@dataclass(frozen=True)
class Problem:
    """A case at one shape and dtype."""

    case: Case
    shape: Shape
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.case.op} {'x'.join(map(str, self.shape))} {short(self.dtype)}"

    def make_inputs(self, seed: int, device: torch.device) -> Tensors:
        """Draw normal numbers of `seed`, with the strides that the model gives them."""
        specs = self.case.inputs(self.shape, self.dtype)
        generator = torch.Generator(device).manual_seed(seed)

        def normal(shape: Shape, dtype: torch.dtype) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        tensors = {}
        vectors = [name for name in VECTORS if name in specs]
        if vectors:
            batch, width = specs[vectors[0]].shape
            chunks = (0.5 * normal((batch, 6 * width), BRANCH)).chunk(6, dim=-1)
            tensors.update(zip(vectors, chunks))
        for name, spec in specs.items():
            if name == "index":
                tensors[name] = torch.arange(len(spec), device=device)
            elif name == "target":  # half aligned: between unrelated vectors the loss is rounding
                mixed = tensors["prediction"].float() + normal(spec.shape, torch.float32)
                tensors[name] = mixed.to(spec.dtype)
            elif name not in tensors:
                tensors[name] = normal(spec.shape, spec.dtype)
        return {name: tensors[name].detach() for name in specs}

    def make_upstream(self, seed: int, device: torch.device) -> list[torch.Tensor]:
        """Draw gradients of the outputs."""
        generator = torch.Generator(device).manual_seed(1000 + seed)
        return [
            torch.randn(spec.shape, generator=generator, device=device).to(spec.dtype)
            for spec in self.case.outputs(self.shape, self.dtype).values()
        ]

    def necessary_bytes(self, mode: str) -> int:
        """Return the bytes that cannot be avoided: each tensor read once and written once.

        forward: all arguments and all results. backward: the upstream gradient of each result, the
        arguments and results that its formula needs, and the gradients that are not in place.
        Statistics (mean, rstd, norms, log-sum-exp) and partial sums are not counted.
        """
        inputs = self.case.inputs(self.shape, self.dtype)
        outputs = self.case.outputs(self.shape, self.dtype)
        both = {**inputs, **outputs}
        forward = sum(tensor.nbytes for tensor in both.values())
        upstream = sum(tensor.nbytes for tensor in outputs.values())
        read = upstream + sum(both[name].nbytes for name in self.case.saved)
        written = set(self.case.gradients) - set(self.case.in_place)
        backward = read + sum(inputs[name].nbytes for name in written)
        return {"forward": forward, "backward": backward, "both": forward + backward}[mode]

    def flops(self, mode: str) -> int:
        return self.case.flops(self.shape, mode)


def short(dtype: torch.dtype) -> str:
    """Return fp32 for torch.float32 and so on."""
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def _rows(shape: Shape, dtype: torch.dtype, *names: str) -> Tensors:
    """Return x (B, N, D) of `dtype`, branch (B, N, D) and vectors (B, D) in bf16, by name."""
    whole = {"x": meta(shape, dtype), "branch": meta(shape, BRANCH)}
    return {name: whole.get(name, meta((shape[0], shape[2]), BRANCH)) for name in names}


def _step_plain(x, v_cond, v_uncond, index) -> tuple[torch.Tensor, torch.Tensor]:
    """Take an euler_maruyama_step of which all but the tensors is known, so that it compiles."""
    out = euler_maruyama_step_reference(
        x,
        v_cond,
        v_uncond,
        STEP["dt"],
        coefficients=COEFFICIENTS,
        diffusion=STEP["diffusion"],
        cfg_scale=STEP["cfg_scale"],
        noise=standard_normal(x.shape, STEP["seed"], 0, index),
    )
    return out, out.to(v_cond.dtype)


def _tokens(shape: Shape, dtype: torch.dtype, name: str, *axes: int) -> Tensors:
    """Return a tensor (B, N, *axes, H, K), by name, of attention at `shape` (B, H, N, K)."""
    batch, heads, tokens, head_dim = shape
    return {name: meta((batch, tokens, *axes, heads, head_dim), dtype)}


def _attention_flops(shape: Shape, mode: str) -> int:
    """Count 2 matmuls of N x N x K per head forward (2 FLOPs per multiply-add), 5 backward.

    Backward: the scores again, dv, dp, dq and dk.
    """
    batch, heads, tokens, head_dim = shape
    product = 2 * batch * heads * tokens**2 * head_dim
    return {"forward": 2, "backward": 5, "both": 7}[mode] * product


_TABLE = (
    Case(
        op="gate_residual_adaln",
        call=ops.gate_residual_adaln,
        inputs=lambda shape, dtype: _rows(shape, dtype, "x", "branch", "gate", "shift", "scale"),
        outputs=lambda shape, dtype: {"out": meta(shape, dtype), "y": meta(shape, BRANCH)},
        saved=("out", "branch", "gate", "scale"),
        gradients=("x", "branch", "gate", "shift", "scale"),
    ),
    Case(
        op="adaln",
        call=ops.adaln,
        inputs=lambda shape, dtype: _rows(shape, dtype, "x", "shift", "scale"),
        outputs=lambda shape, dtype: {"y": meta(shape, BRANCH)},
        saved=("x", "scale"),
        gradients=("x", "shift", "scale"),
    ),
    Case(
        op="gate_residual",
        call=ops.gate_residual,
        inputs=lambda shape, dtype: _rows(shape, dtype, "x", "branch", "gate"),
        outputs=lambda shape, dtype: {"out": meta(shape, dtype)},
        saved=("branch", "gate"),
        gradients=("x", "branch", "gate"),
        in_place=("x",),  # its gradient is that of the result
    ),
    Case(
        op="align_loss",
        call=ops.align_loss,
        inputs=lambda shape, dtype: {n: meta(shape, dtype) for n in ("prediction", "target")},
        outputs=lambda shape, dtype: {"loss": meta(shape[:1], torch.float32)},
        saved=("prediction", "target"),
        gradients=("prediction",),
        shapes=((32, 256, 768), (256, 256, 768)),  # DINOv2-B
        small=(16, 16, 384),
        dtypes=(BRANCH,),
    ),
    Case(
        op="euler_maruyama_step",
        call=ops.euler_maruyama_step,
        inputs=lambda shape, dtype: {
            "x": meta(shape, dtype),
            **{name: meta(shape, BRANCH) for name in ("v_cond", "v_uncond")},
            "index": meta(shape[:1], torch.int64),
        },
        outputs=lambda shape, dtype: {"out": meta(shape, dtype), "copy": meta(shape, BRANCH)},
        shapes=((64, 4, 32, 32),),
        small=(4, 4, 16, 16),
        tiny=(1, 1, 1, 8),
        dtypes=(torch.float32,),
        plain=_step_plain,
        options=STEP,
    ),
    Case(
        op="attention",
        call=ops.attention_packed,
        inputs=lambda shape, dtype: _tokens(shape, dtype, "qkv", 3),
        outputs=lambda shape, dtype: _tokens(shape, dtype, "out"),
        saved=("qkv", "out"),
        gradients=("qkv",),  # packed: where a backend gives three, with the stack of them
        shapes=((32, 16, 256, 72), (256, 16, 256, 72), (32, 12, 257, 64)),  # XL/2, DINOv2-B
        small=(2, 4, 64, 72),
        tiny=(1, 1, 1, 8),
        dtypes=(BRANCH,),
        flops=_attention_flops,
    ),
)
CASES: Mapping[str, Case] = {case.op: case for case in _TABLE}
"""In the order in which they are measured: what the training step gains most by comes first."""


def problems(op: str, device: torch.device) -> list[Problem]:
    """Return what is measured of an op: all shapes and dtypes on a GPU, one of each on a CPU."""
    case = CASES[op]
    if device.type != "cuda":
        return [Problem(case, case.small, case.dtypes[0])]
    return [Problem(case, shape, dtype) for shape in case.shapes for dtype in case.dtypes]


def tiny(op: str) -> Problem:
    """Return the problem at which the host's time is measured."""
    case = CASES[op]
    return Problem(case, case.tiny, case.dtypes[0])
