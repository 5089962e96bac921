"""What makes a step slow on a GPU and can be counted without one."""

import itertools
import math
import re
import sys
from collections import Counter
from operator import methodcaller

import pytest
import torch
from torch._dynamo.exc import RecompileError
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.environment import ROOT
from benchmarks.kernels.ops import CASES, Problem
from repa_fast.backend import dispatch
from repa_fast.models.sit import SiT, SiTBlock
from repa_fast.train.step import losses, synthetic_batch, train_step

BATCH = 4
HALF = {"mixed_precision": "bf16"}
KINDS = {
    "repa": {},
    "micro-batches": {"micro_batch": 2},
    "bf16": HALF,
    "bf16-residual": HALF | {"residual_dtype": "bf16"},
    "sra": HALF | {"align": "sra", "enc_type": "none", "block_out_s": 1, "block_out_t": 2},
    "ddpm": {"objective": "ddpm", "model": "DiT-S/4"},
}
HEAVY = [pytest.param(kind, marks=pytest.mark.heavy) for kind in KINDS if kind != "sra"]


@pytest.fixture
def state_of(make_state):
    """A state of one of KINDS, with the learning rate changing from step to step."""

    def make(kind: str, **changes):
        options = {"optimizer_impl": "torch", "batch_size": BATCH, "warmup_steps": 100}
        options |= KINDS[kind] | changes
        micro_batch = options.pop("micro_batch", BATCH)
        state = make_state(**options)
        state.micro_batch = micro_batch
        return state

    return make


@pytest.fixture
def traced_only(monkeypatch):
    """What is compiled is traced as it would be, but its graphs run as they are."""
    compiled = torch.compile

    def traced(function, *, options=None, **given):
        return compiled(function, backend="aot_eager", **given)

    monkeypatch.setattr(torch, "compile", traced)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["sra", *HEAVY])
def test_nothing_breaks_a_graph_or_compiles_again_after_the_first_step(state_of, traced_only, kind):
    state = state_of(kind, compile=True)
    batch, _ = synthetic_batch(state, BATCH)
    train_step(state, batch)
    graphs = counters["stats"]["unique_graphs"]
    # blocks with and without a pending branch; SRA's teacher has both without gradients, the others
    # an encoder
    assert graphs == (4 if kind == "sra" else 3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            train_step(state, batch)
        assert counters["stats"]["unique_graphs"] == graphs
        assert not counters["graph_break"]
        other, draws = synthetic_batch(state, BATCH + 1)
        with pytest.raises(RecompileError):
            losses(state, state.model, other, draws)


@pytest.mark.parametrize("pending", [True, False])
def test_a_block_is_two_operators_of_ours_each_way(monkeypatch, pending):
    """In the graph of forward and backward, traced with fake tensors as if kernels could run."""
    monkeypatch.setattr(dispatch, "why_not_triton", lambda device: "")
    block = SiTBlock(32, 2, 4.0, qk_norm=False, fused_attn=True)
    shapes = [(2, 4, 32), (2, 192), (2, 4, 32), (2, 32)]
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def both_ways(x, modulation, branch, gate):
        out = block(x, *((branch, gate) if pending else (None, None)), modulation)
        given = [x, modulation, *([branch, gate] if pending else [])]
        return torch.autograd.grad(out, given, [torch.ones_like(one) for one in out])

    trace = make_fx(both_ways, tracing_mode="fake", _allow_non_fake_inputs=True)
    nodes = trace(*tensors).graph.nodes
    targets = Counter(node.target.name() for node in nodes if hasattr(node.target, "name"))
    ours = {name: n for name, n in targets.items() if name.startswith("repa_fast::")}
    first = "gate_residual_adaln" if pending else "adaln"
    both = itertools.product((first, "gate_residual_adaln"), ("forward", "backward"))
    assert ours == Counter(f"repa_fast::{op}_{way}" for op, way in both)
    plain = Counter(name.removeprefix("aten::").partition(".")[0] for name in targets.elements())
    for unfused in ("native_layer_norm", "native_layer_norm_backward", "mul", "sum", "_to_copy"):
        assert not plain[unfused], unfused
    # both operators give a gradient of x where nothing was pending
    assert plain["add"] == (0 if pending else 1)


class HostReads(TorchDispatchMode):
    """Counts, by the function of ours or of torch's optimizers, reads of a tensor by the host.

    Whatever on a GPU waits for the device: values as Python numbers, and results whose shape
    depends on values.
    """

    READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")
    METHODS = ("tolist", "numpy", "cpu")

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in self.METHODS:
            self.patch.setattr(torch.Tensor, name, self._counted(getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *reason):
        self.patch.undo()
        return super().__exit__(*reason)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket.__name__ in ("index", "index_put_", "index_put") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if func.overloadpacket.__name__ in self.READS or by_mask:
            self.reads[reader()] += 1
        return func(*args, **(kwargs or {}))

    def _counted(self, method):
        def call(tensor, *arguments, **options):
            self.reads[reader()] += 1
            return method(tensor, *arguments, **options)

        return call


def reader() -> str:
    """The innermost function on the stack that is ours, a test's or of torch.optim."""
    frame = sys._getframe(2)
    while frame.f_back:
        file = frame.f_code.co_filename
        if any(part in file for part in ("/repa_fast/", "/kernels/", "/optim/", "/tests/")):
            break
        frame = frame.f_back
    return frame.f_code.co_qualname


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_reads_nothing_of_the_device_in_a_step(state_of, kind):
    state = state_of(kind)
    batch, _ = synthetic_batch(state, BATCH)
    train_step(state, batch)
    with HostReads() as host:
        train_step(state, batch)
    # which looks at labels on a CPU only
    assert set(host.reads) <= {"LabelEmbedder._check"}


@pytest.mark.parametrize(
    "read",
    [
        *map(methodcaller, ("tolist", "cpu", "numpy", "nonzero", "unique")),
        *(lambda x: x.sum().item(), lambda x: bool(x.sum()), lambda x: float(x.sum())),
        *(lambda x: x[x > 0], lambda x: torch.equal(x, x)),
    ],
)
def test_a_read_is_counted(read):
    with HostReads() as host:
        read(torch.ones(3))
    assert sum(host.reads.values()) >= 1


def test_forward_and_backward_are_three_times_the_forward_pass():
    """With explicit attention: flash computes scores once more."""
    sizes = {"input_size": 16, "hidden_size": 384, "depth": 4, "num_heads": 6}
    heads = {"encoder_depth": 2, "z_dims": (48,), "projector_dim": 96}
    model = SiT(**sizes, **heads, fused_attn=False)
    with FlopCounterMode(display=False) as counter:
        inputs = torch.randn(2, 4, 16, 16), torch.rand(2), torch.tensor([1, 2])
        velocity, (projection,) = model(*inputs)
        forward = counter.get_total_flops()
        (velocity.sum() + projection.sum()).backward()
    assert counter.get_total_flops() == pytest.approx(3 * forward, rel=0.01)


FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    "op, dtype, stated",
    [
        ("adaln", FP32, {"forward": 6, "backward": 10}),
        ("adaln", BF16, {"forward": 4, "backward": 6}),
        ("gate_residual_adaln", FP32, {"forward": 12, "backward": 18}),
        ("gate_residual_adaln", BF16, {"backward": 12}),
        ("align_loss", BF16, {"forward": 4}),
        ("attention", BF16, {"forward": 8, "backward": 16}),
    ],
)
def test_bytes_of_an_op_are_those_that_its_readme_states(op, dtype, stated):
    """Per element of (B, N, D), the part that grows with N; vectors of a sample do not."""
    case, axis = CASES[op], 2 if op == "attention" else 1
    small, large = list(case.small), list(case.small)
    large[axis] *= 2
    few, many = (Problem(case, tuple(shape), dtype) for shape in (small, large))
    for mode, bytes_each in stated.items():
        assert f"{bytes_each}A" in re.findall(r"\d+A\b", cost_in_readme(op))
        added = many.necessary_bytes(mode) - few.necessary_bytes(mode)
        assert added == bytes_each * math.prod(small)


def test_bytes_of_a_sampler_step_are_those_that_its_readme_states():
    """An fp64 state, read and written, two bf16 velocities and a bf16 copy; 8 bytes of a number."""
    assert "8 + 2 + 2 + 8 + 2 = 22E bytes" in cost_in_readme("euler_maruyama_step")
    shape = (3, 4, 16, 16)
    problem = Problem(CASES["euler_maruyama_step"], shape, torch.float64)
    assert problem.necessary_bytes("forward") == 22 * math.prod(shape) + 8 * shape[0]


def cost_in_readme(op: str) -> str:
    text = (ROOT / "kernels" / op / "README.md").read_text()
    return re.search(r"^## Cost\n(.*?)^## ", text, re.MULTILINE | re.DOTALL).group(1)
