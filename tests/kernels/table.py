"""The ops as a table: arguments, outputs, and closed forms of these and of the gradients."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import torch

from repa_fast.diffusion.path import PATHS
from repa_fast.testing import assert_within_budget, modulation_chunks, seeded

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
# how an op runs; the process of the interpreter is started by one worker of pytest-xdist alone
INTERPRETED = pytest.mark.xdist_group("interpreter")
KERNELS = (
    pytest.param("interpreter", marks=INTERPRETED),
    pytest.param("triton", marks=pytest.mark.gpu),
)
EVERYWHERE = (pytest.param("reference"), *KERNELS)
# dtype of the residual stream, dtype of branch and modulation
PAIRS = ((F32, F32), (F32, BF16), (BF16, BF16), (F16, F16))


def normalised(x, eps):
    centred = x - x.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps) ** -0.5
    return centred * rstd, rstd


def adaln(x, shift, scale, *, upstream, rounded, eps=1e-6):
    """Of a single column dx is g - mean(g) with the first g unrounded.

    There all of it cancels, and what is left is the rounding of that product: a GPU's compiler
    contracts it into the subtraction, a CPU's does not.
    """
    (dy,) = upstream
    xhat, rstd = normalised(x, eps)
    y = xhat * (1 + scale[:, None]) + shift[:, None]
    first = g = dy * (1 + scale[:, None])
    rest = g.mean(-1, keepdim=True)
    if x.shape[-1] == 1:
        exact = dy.double() * (1 + scale.double()[:, None])
        first, rest = (exact - g.double()).to(g.dtype), 0
    dx = rstd * (first - rest - xhat * (g * xhat).mean(-1, keepdim=True))
    return y, dx, dy.sum(1), (dy * xhat).sum(1)


def gate_residual(x, branch, gate, *, upstream, rounded):
    (dnew,) = upstream
    return x + gate[:, None] * branch, dnew, gate[:, None] * dnew, (dnew * branch).sum(1)


def gate_residual_adaln(x, branch, gate, shift, scale, *, upstream, rounded, eps=1e-6):
    dnew, dy = upstream
    new = rounded(x + gate[:, None] * branch)
    y, dx, dshift, dscale = adaln(new, shift, scale, upstream=(dy,), rounded=rounded, eps=eps)
    dx = rounded(dnew + dx)
    return new, y, dx, gate[:, None] * dx, (dx * branch).sum(1), dshift, dscale


def align_loss(prediction, target, *, upstream, rounded, eps=1e-12):
    norms = [v.square().sum(-1, keepdim=True).sqrt().clamp_min(eps) for v in (prediction, target)]
    p, q = prediction / norms[0], target / norms[1]
    c = (p * q).sum(-1, keepdim=True)
    mean = upstream[0] / max(p.shape[1], 1)
    return -c[..., 0].mean(-1), mean[:, None, None] * (c * p - q) / norms[0], None


def euler_maruyama_step(
    x, v_cond, v_uncond, noise, *, t, dt, path, diffusion, cfg_scale, upstream, rounded
):
    """REPA eq. 6 and 7."""
    v = v_cond if v_uncond is None else v_uncond + cfg_scale * (v_cond - v_uncond)
    alpha, sigma, d_alpha, d_sigma = PATHS[path].at(t)
    score = (alpha * v - d_alpha * x) / (d_alpha * sigma - alpha * d_sigma) / sigma
    new = x + (v - diffusion / 2 * score) * dt
    new = new if noise is None else new + math.sqrt(diffusion * abs(dt)) * noise
    return new, new


@dataclass(frozen=True)
class Op:
    """What the tests of all ops need to know of one.

    Attributes:
        closed: its formulas, outputs and then gradients (None where there is none) by arguments.
        outputs: {output: the argument whose dtype it has, "" for fp32}.
        tokens: arguments that are (B, N, D); the first is the residual stream.
        vectors: arguments that are (B, D), chunks of one tensor.
        plain: its other arguments.
        gradients: it has any.
        batch: of the smallest inputs whose errors are typical.
    """

    closed: Callable
    outputs: Mapping[str, str]
    tokens: tuple[str, ...]
    vectors: tuple[str, ...] = ()
    plain: Mapping[str, object] = field(default_factory=dict)
    gradients: bool = True
    batch: int = 2

    @property
    def name(self) -> str:
        return self.closed.__name__

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.batch, 3, 24)

    def arguments(self, shape=None, stream=F32, dtype=F32):
        """{name: value}; chunks lie in a tensor of a block's six."""
        shape = shape or self.shape
        found = {n: seeded(shape, seed=2 + i, dtype=dtype) for i, n in enumerate(self.tokens[1:])}
        if self.name == "align_loss":
            target = seeded(shape, seed=1, dtype=dtype, mean=0.2)
            prediction = target + seeded(shape, seed=2, dtype=dtype)  # cosine near 0.7
            return {"prediction": prediction, "target": target}
        chunks = modulation_chunks(shape[0], shape[-1], seed=3, dtype=dtype)
        found |= {name: chunks[["shift", "scale", "gate"].index(name)] for name in self.vectors}
        x = seeded(shape, seed=1, dtype=stream, mean=0.7, std=2.0)
        return {"x": x, **found, **self.plain}

    def dtypes(self, arguments, out_dtype=None):
        """Of the outputs; `out_dtype` is that of y."""
        told = {"y": out_dtype} if out_dtype else {}
        return [
            told.get(output) or (arguments[of].dtype if of else F32)
            for output, of in self.outputs.items()
        ]

    def upstream(self, arguments, out_dtype=None):
        """Gradients of the outputs, or None for an op that has none."""
        if not self.gradients:
            return None
        first = arguments[self.tokens[0]]
        if self.name == "align_loss":  # loss scaling in fp16, else dprediction is subnormal
            losses = seeded(first.shape[:1], seed=3, mean=1.0)
            return [losses * (1024 if first.dtype == F16 else 1)]
        dtypes = self.dtypes(arguments, out_dtype)
        return [seeded(first.shape, seed=4 + i, dtype=dtype) for i, dtype in enumerate(dtypes)]

    def results(self, arguments, upstream, work, out_dtype=None, **options):
        """(outputs, gradients) by the closed forms in `work`; in fp32 rounded where the op rounds.

        An output that is not used has the upstream gradient None.
        """
        stream, plain = arguments[self.tokens[0]], work != F32
        names = (*self.tokens, *self.vectors) if self.gradients else ()
        cast = {k: v.to(work) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        upstream = [torch.zeros_like(stream) if up is None else up for up in upstream or ()]
        found = self.closed(
            **cast,
            upstream=[up.to(work) for up in upstream],
            rounded=lambda v: v if plain else v.to(stream.dtype).to(work),
            **options,
        )
        dtypes = self.dtypes(arguments, out_dtype) + [arguments[name].dtype for name in names]
        results = [v if plain or v is None else v.to(d) for v, d in zip(found, dtypes)]
        return results[: len(self.outputs)], results[len(self.outputs) :]

    def named(self, outputs, gradients):
        """{what a result is called: it}."""
        names = (*self.outputs, *(f"d{name}" for name in (*self.tokens, *self.vectors)))
        return dict(zip(names, (*outputs, *gradients)))

    def expect_budgets(self, run, arguments, upstream, out_dtype=None, **options):
        """All results against the closed forms, and their dtypes."""
        told = options | ({"out_dtype": out_dtype} if out_dtype else {})
        found = self.named(*run(self.name, arguments, upstream, **told))
        exact, plain = (
            self.named(*self.results(arguments, upstream, work, out_dtype, **options))
            for work in (F64, F32)
        )
        for name, oracle in exact.items():
            if oracle is None:
                assert found[name] is None, name
            else:
                nothing = torch.zeros_like(plain[name])  # of an output without influence
                actual = nothing if found[name] is None else found[name]
                assert_within_budget(name, actual, oracle, plain[name])


OPS = {
    op.name: op
    for op in (
        Op(adaln, {"y": "shift"}, ("x",), ("shift", "scale")),
        Op(gate_residual, {"x'": "x"}, ("x", "branch"), ("gate",)),
        Op(
            gate_residual_adaln,
            {"x'": "x", "y": "shift"},
            ("x", "branch"),
            ("gate", "shift", "scale"),
        ),
        Op(align_loss, {"loss": ""}, ("prediction", "target"), batch=16),
        Op(
            euler_maruyama_step,
            {"next state": "x", "copy": "v_cond"},
            ("x", "v_cond", "v_uncond", "noise"),
            plain={"t": 0.5, "dt": -0.02, "path": "linear", "diffusion": 1.0, "cfg_scale": 1.8},
            gradients=False,
        ),
    )
}
STREAM = ("adaln", "gate_residual", "gate_residual_adaln")
ADALN = ("adaln", "gate_residual_adaln")
DIFFERENTIABLE = (*STREAM, "align_loss")


def on(*names, where=EVERYWHERE):
    """Parametrise a test by (op, run): ops of these names, all if there are none, everywhere."""
    cases = [
        pytest.param(OPS[name], *how.values, marks=how.marks, id=f"{name}-{how.values[0]}")
        for name in names or OPS
        for how in where
    ]
    return pytest.mark.parametrize("op, run", cases, indirect=["run"])


def assert_same(actual, expected):
    """The same (outputs, gradients) in every bit; None is a gradient that there is not."""
    for these, those in zip(actual, expected, strict=True):
        for a, b in zip(these, those, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
