import logging

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from repa_fast import ops
from repa_fast.dispatch import use_kernels
from repa_fast.kernels.gelu_mlp import op as module
from repa_fast.testing import assert_within_budget, seeded
from tests.kernels.products import backward_into, gelu, stand_in

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
NAMES = ("x", "weight1", "bias1", "weight2", "bias2")
SHAPES = (((2, 5, 16), 40), ((7, 24), 64), ((8,), 16), ((1, 8), 8))


def make(shape, hidden, *, x=F32, weights=F32, device="cpu"):
    """Arguments by name, of values that bf16 has; GELU's argument is of the order of 1."""
    width = shape[-1]
    shapes = ((hidden, width), (hidden,), (width, hidden), (width,))
    stds = (width**-0.5, 0.5, hidden**-0.5, 0.5)
    tensors = [seeded(shape, seed=0, dtype=BF16).to(x)]
    for seed, (size, std) in enumerate(zip(shapes, stds), start=1):
        tensors.append(seeded(size, seed=seed, dtype=BF16, std=std).to(weights))
    return {name: tensor.to(device) for name, tensor in zip(NAMES, tensors)}


def upstream(shape, dtype, device="cpu"):
    return seeded(shape, seed=9, dtype=BF16).to(device, dtype)


def results(arguments, implementation, dtype=None, call=ops.gelu_mlp, **options):
    """Output and gradients by name, all arguments in `dtype` if given."""
    leaves = {
        name: value.to(dtype or value.dtype).detach().clone().requires_grad_()
        for name, value in arguments.items()
    }
    y = call(**leaves, implementation=implementation, **options)
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream(y.shape, y.dtype, y.device))
    return {"y": y.detach(), **dict(zip(NAMES, gradients))}


def closed_form(x, weight1, bias1, weight2, bias2, dy):
    """Output and gradients by the formulas of the README, in the dtype of the arguments."""
    rows, up = x.reshape(-1, x.shape[-1]), dy.reshape(-1, x.shape[-1])
    u = torch.einsum("md,fd->mf", rows, weight1) + bias1
    h, slope = gelu(u)
    y = torch.einsum("mf,df->md", h, weight2) + bias2
    du = torch.einsum("md,df->mf", up, weight2) * slope
    gradients = (
        torch.einsum("mf,fd->md", du, weight1).reshape(x.shape),
        torch.einsum("mf,md->fd", du, rows),
        du.sum(0),
        torch.einsum("md,mf->df", up, h),
        up.sum(0),
    )
    return {"y": y.reshape(x.shape), **dict(zip(NAMES, gradients))}


def assert_all_within_budget(actual, arguments):
    """Against fp64, and what plain torch does with the same arguments."""
    oracle, working = results(arguments, "reference", F64), results(arguments, "reference")
    for name, value in actual.items():
        assert oracle[name].isfinite().all(), name
        assert_within_budget(name, value, oracle[name], working[name])


@pytest.fixture
def products(monkeypatch):
    """implementation="cuda" runs, on the CPU."""
    stand_in(monkeypatch)


# The specification.


@pytest.mark.parametrize("shape, hidden", SHAPES)
def test_reference_is_the_closed_form_in_fp64(shape, hidden):
    arguments = make(shape, hidden, x=F64, weights=F64)
    found = results(arguments, "reference")
    expected = closed_form(**arguments, dy=upstream(shape, F64))
    for name, value in expected.items():
        # sums of at most 64 terms of the order of 1
        torch.testing.assert_close(found[name], value, rtol=0, atol=64 * 64 * torch.finfo(F64).eps)


def test_reference_passes_gradcheck():
    leaves = [v.requires_grad_() for v in make((3, 4), 8, x=F64, weights=F64).values()]
    assert torch.autograd.gradcheck(lambda *v: ops.gelu_mlp(*v, implementation="reference"), leaves)


@pytest.mark.parametrize("implementation", ("reference", "cuda"))
@pytest.mark.parametrize("weights", (F32, BF16, F64))
def test_every_gradient_has_the_dtype_of_its_tensor(products, implementation, weights):
    arguments = make((3, 16), 24, x=BF16, weights=weights)
    found = results(arguments, implementation)
    assert found["y"].dtype == BF16
    assert all(found[name].dtype == value.dtype for name, value in arguments.items())
    assert_all_within_budget(found, arguments)


@pytest.mark.parametrize("implementation", ("reference", "cuda"))
def test_copies_are_computed_with_and_weights_get_the_gradients(products, implementation):
    arguments = make((2, 3, 16), 24, x=BF16)
    copies = tuple((arguments[name] / 2).to(BF16) for name in ("weight1", "weight2"))
    found = results(arguments, implementation, copies=copies)
    replaced = arguments | {"weight1": copies[0].float(), "weight2": copies[1].float()}
    expected = results(replaced, implementation)
    for name in found:
        assert torch.equal(found[name], expected[name]), name
    assert found["weight1"].dtype == found["weight2"].dtype == F32


def test_copies_may_be_written_once_their_gradients_are_there_but_not_before(products):
    arguments = make((2, 16), 24, x=BF16)
    weight1, weight2 = arguments["weight1"].requires_grad_(), arguments["weight2"]
    copies = (weight1.detach().to(BF16), weight2.to(BF16))
    y = ops.gelu_mlp(**arguments, copies=copies, implementation="cuda")
    copies[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("implementation", ("reference", "cuda"))
@pytest.mark.parametrize("dtype", (BF16, torch.float16))
def test_autocast_changes_nothing(products, implementation, dtype):
    def under_autocast(**arguments):
        with torch.autocast("cpu", dtype=dtype):
            return ops.gelu_mlp(**arguments)

    arguments = make((2, 16), 24, x=BF16 if implementation == "cuda" else F32)
    expected = results(arguments, implementation)
    found = results(arguments, implementation, call=under_autocast)
    for name, value in expected.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype


# The autograd function over the products.


@pytest.mark.parametrize("shape, hidden", SHAPES)
def test_products_give_value_and_gradients(products, shape, hidden):
    arguments = make(shape, hidden, x=BF16)
    assert_all_within_budget(results(arguments, "cuda"), arguments)


def test_gradients_of_fp32_weights_are_not_rounded_to_bf16(products):
    arguments = make((64, 16), 24, x=BF16)
    for implementation, exact in (("cuda", True), ("reference", False)):
        found = results(arguments, implementation)
        for name in ("weight1", "weight2", "bias2"):
            assert torch.equal(found[name], found[name].to(BF16).float()) != exact
        assert torch.equal(found["bias1"], found["bias1"].to(BF16).float())


def test_budgets_fail_for_a_derivative_that_is_off_by_one_percent(monkeypatch):
    def wrong(dy, x, pre, hidden, weight1, weight2, *written):
        backward_into(dy, x, pre, hidden, weight1, 1.01 * weight2.float(), *written)

    arguments = make((256, 16), 24, x=BF16)
    stand_in(monkeypatch, wrong)
    found = results(arguments, "cuda")
    for name in ("x", "weight1", "bias1"):
        with pytest.raises(AssertionError, match="of the error is"):
            assert_all_within_budget({name: found[name]}, arguments)
    assert_all_within_budget({name: found[name] for name in ("y", "weight2", "bias2")}, arguments)


@pytest.mark.parametrize("expanded", (False, True))
def test_an_upstream_gradient_may_have_any_strides(products, expanded):
    arguments = make((2, 6, 16), 24, x=BF16)
    leaves = {name: value.requires_grad_() for name, value in arguments.items()}
    y = ops.gelu_mlp(**leaves, implementation="cuda")
    dy = torch.ones((), dtype=BF16).expand_as(y)
    if not expanded:
        dy = upstream((6, 2, 16), BF16).transpose(0, 1)
    found, expected = (
        torch.autograd.grad(y, list(leaves.values()), up, retain_graph=True)
        for up in (dy, dy.contiguous())
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_tensors_that_begin_at_an_odd_address_are_copied(monkeypatch):
    seen = []

    def note(*tensors):
        seen.extend(tensor.data_ptr() % 16 for tensor in tensors)
        backward_into(*tensors)

    stand_in(monkeypatch, note)
    arguments = make((3, 16), 24, x=BF16)
    storage = torch.zeros(3 * 16 + 1, dtype=BF16)
    odd = arguments | {"x": storage[1:].view(3, 16).copy_(arguments["x"])}
    leaves = {name: value.detach().requires_grad_() for name, value in odd.items()}
    y = ops.gelu_mlp(**leaves, implementation="cuda")
    y.backward(upstream(y.shape, BF16))
    expected = results(arguments, "cuda")
    assert torch.equal(leaves["x"].grad, expected["x"]) and set(seen) == {0}


def test_no_gradient_is_needed_for_a_value(products):
    arguments = make((3, 16), 24, x=BF16)
    with torch.no_grad():
        y = ops.gelu_mlp(**arguments, implementation="cuda")
    assert torch.equal(y, results(arguments, "cuda")["y"]) and not y.requires_grad


def test_differentiating_twice_raises(products):
    leaves = {name: value.requires_grad_() for name, value in make((3, 16), 24, x=BF16).items()}
    y = ops.gelu_mlp(**leaves, implementation="cuda")
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(y.sum(), leaves["x"], create_graph=True)


# torch.compile and checkpoints.


class Block(torch.nn.Module):
    def __init__(self, width, hidden, implementation):
        super().__init__()
        arguments = make((1, width), hidden)
        for name in NAMES[1:]:
            self.register_parameter(name, torch.nn.Parameter(arguments[name]))
        self.implementation = implementation

    def forward(self, x):
        copies = (self.weight1.detach().to(x.dtype), self.weight2.detach().to(x.dtype))
        parameters = (self.weight1, self.bias1, self.weight2, self.bias2)
        options = {"copies": copies, "implementation": self.implementation}
        return x + ops.gelu_mlp(torch.tanh(x), *parameters, **options)


def block_gradients(block, call, x, dy):
    x = x.detach().clone().requires_grad_()
    y = call(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], dy)]


@pytest.mark.parametrize("implementation", ("auto", "cuda"))
@pytest.mark.parametrize("how", ("compiled", "dynamic", "checkpointed"))
def test_a_block_gives_the_same_bits(products, implementation, how):
    block = Block(16, 24, implementation)
    x, dy = seeded((2, 5, 16), seed=3, dtype=BF16), upstream((2, 5, 16), BF16)
    expected = block_gradients(block, block, x, dy)
    if how == "checkpointed":
        found = block_gradients(block, lambda x: checkpoint(block, x, use_reentrant=False), x, dy)
    else:
        options = {"fullgraph": True, "backend": "aot_eager", "dynamic": how == "dynamic"}
        found = block_gradients(block, torch.compile(block, **options), x, dy)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_graphs_have_one_node_for_each_direction(products):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    nodes = []

    def note(graph, inputs):
        nodes.append([str(node.target) for node in graph.graph.nodes if "gelu" in str(node.target)])
        return make_boxed_func(graph.forward)

    block, backend = Block(16, 24, "cuda"), aot_autograd(fw_compiler=note, bw_compiler=note)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    block_gradients(block, compiled, seeded((5, 16), seed=3, dtype=BF16), upstream((5, 16), BF16))
    assert nodes == [
        ["repa_fast.gelu_mlp_forward.default"],
        ["repa_fast.gelu_mlp_backward.default"],
    ]


@pytest.mark.parametrize("weight_dtype", (F32, BF16))
def test_operators_pass_opcheck(products, weight_dtype):
    x, *parameters = make((2, 5, 16), 24, x=BF16, weights=BF16).values()
    forward, backward = torch.ops.repa_fast.gelu_mlp_forward, torch.ops.repa_fast.gelu_mlp_backward
    _, pre, hidden = forward(x, *parameters)
    weights = (parameters[0], parameters[2])
    gradient = (upstream(x.shape, BF16), x, pre, hidden, *weights, weight_dtype)
    for operator, arguments in ((forward, (x, *parameters)), (backward, gradient)):
        checks = torch.library.opcheck(operator.default, arguments)
        assert set(checks.values()) == {"SUCCESS"}


# What it refuses, and what it chooses.


@pytest.mark.parametrize(
    "name, value, message",
    (
        ("x", torch.ones(()), r"x has shape \(\), expected \(\.\.\., D\)"),
        ("x", torch.ones(3, 15), r"weight1 has shape \(24, 16\), expected \(24, 15\)"),
        ("x", torch.ones(3, 16).long(), r"x has dtype torch.int64, expected a floating"),
        ("weight1", torch.ones(16), r"weight1 has shape \(16,\), expected \(F, D\)"),
        ("bias1", torch.ones(16), r"bias1 has shape \(16,\), expected \(24,\)"),
        ("weight2", torch.ones(24, 16), r"weight2 has shape \(24, 16\), expected \(16, 24\)"),
        ("bias2", torch.ones(24), r"bias2 has shape \(24,\), expected \(16,\)"),
        ("bias2", torch.ones(16).int(), r"bias2 has dtype torch.int32, expected a floating"),
        ("bias1", torch.ones(24, device="meta"), r"bias1 is on meta, expected cpu as x"),
        ("copies", (torch.ones(24, 16).half(),) * 2, r"copy of weight1 has dtype torch.float16"),
        ("copies", (torch.ones(24, 16),) * 2, r"copy of weight2 has shape \(24, 16\), expected"),
    ),
)
def test_arguments_that_do_not_fit_are_refused_by_name(name, value, message):
    with pytest.raises(ValueError, match=f"gelu_mlp: {message}"):
        ops.gelu_mlp(**make((3, 16), 24) | {name: value})


def test_explicit_cuda_on_the_cpu_says_why():
    with pytest.raises(ValueError, match=r"implementation is 'cuda', but the tensors are on cpu"):
        ops.gelu_mlp(**make((3, 16), 24, x=BF16), implementation="cuda")


def test_unknown_implementation_is_refused():
    expected = r"implementation is 'triton', expected one of auto, cuda, reference"
    with pytest.raises(ValueError, match=expected):
        ops.gelu_mlp(**make((3, 16), 24), implementation="triton")


def transposed(tensor):
    return tensor.t().contiguous().t()


UNFIT = {
    "it does not take torch.float32": make((3, 16), 24),
    r"the widths \(20, 16\) are not multiples of 8": make((3, 16), 20, x=BF16),
    r"the widths \(24, 12\) are not multiples of 8": make((3, 12), 24, x=BF16),
    "a tensor is not contiguous": {
        **make((3, 16), 24, x=BF16),
        "x": transposed(torch.ones(3, 16, dtype=BF16)),
    },
    "x is empty": make((0, 16), 24, x=BF16),
}


@pytest.mark.parametrize("reason", UNFIT)
def test_what_the_products_do_not_take_goes_to_the_reference(products, caplog, reason):
    with pytest.raises(ValueError, match=f"implementation is 'cuda', but {reason}"):
        ops.gelu_mlp(**UNFIT[reason], implementation="cuda")
    module._say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            found = ops.gelu_mlp(**UNFIT[reason])
    assert torch.equal(found, ops.gelu_mlp(**UNFIT[reason], implementation="reference"))
    (message,) = caplog.messages
    assert message.startswith("gelu_mlp: reference, since")


def test_auto_takes_the_products_unless_the_process_asks_for_the_reference(products):
    arguments = make((64, 16), 24, x=BF16)
    try:
        for asked in ("reference", None):
            use_kernels(asked)
            found = results(arguments, "auto")
            expected = results(arguments, asked or "cuda")
            assert all(torch.equal(found[name], expected[name]) for name in found)
    finally:
        use_kernels(None)


# On a GPU.

WIDE = (((32, 16, 1152), 4608), ((3, 37, 1152), 4608), ((1, 1152), 4608), ((7, 24), 64))


@pytest.fixture
def cuda():
    """The first device, where the library is built."""
    if reason := module.why_not_cuda("cuda"):
        pytest.fail(reason)
    return torch.device("cuda", 0)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", (F32, BF16))
@pytest.mark.parametrize("shape, hidden", WIDE)
def test_cublaslt_gives_value_and_gradients(cuda, shape, hidden, weights):
    arguments = make(shape, hidden, x=BF16, weights=weights, device=cuda)
    assert_all_within_budget(results(arguments, "cuda"), arguments)


@pytest.mark.gpu
def test_auto_is_cublaslt_on_a_gpu_and_budgets_fail_for_one_percent(cuda):
    arguments = make((512, 1152), 4608, x=BF16, device=cuda)
    found, again = results(arguments, "auto"), results(arguments, "cuda")
    for name, value in found.items():
        assert torch.equal(value, again[name]), name
        with pytest.raises(AssertionError, match="of the error is"):
            assert_all_within_budget({name: (1.01 * value.float()).to(value.dtype)}, arguments)


@pytest.mark.gpu
def test_cublaslt_gives_fp32_sums_for_fp32_weights(cuda):
    found = results(make((512, 1152), 4608, x=BF16, device=cuda), "cuda")
    for name in ("weight1", "weight2", "bias2"):
        assert found[name].dtype == F32
        assert not torch.equal(found[name], found[name].to(BF16).float())


@pytest.mark.gpu
def test_forward_and_backward_are_captured_and_replayed(cuda):
    arguments = make((4, 64, 1152), 4608, x=BF16, device=cuda)
    copies = tuple(arguments[name].to(BF16) for name in ("weight1", "weight2"))
    leaves = {name: value.clone().requires_grad_() for name, value in arguments.items()}
    dy = upstream((4, 64, 1152), BF16, cuda)

    def run():
        y = ops.gelu_mlp(**leaves, copies=copies, implementation="cuda")
        return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # makes the handle, chooses the algorithms, loads the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for scale in (0.5, 2.0):
        with torch.no_grad():
            leaves["x"].copy_(scale * arguments["x"])
        graph.replay()
        replayed = [value.clone() for value in captured]
        for a, b in zip(replayed, run(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_inductor_gives_the_same_bits(cuda):
    arguments = make((2, 64, 1152), 4608, x=BF16, device=cuda)
    found = results(arguments, "cuda", call=torch.compile(ops.gelu_mlp, fullgraph=True))
    for name, value in results(arguments, "cuda").items():
        assert torch.equal(found[name], value), name


@pytest.mark.gpu
def test_products_run_on_the_current_stream(cuda):
    arguments = make((64, 1152), 4608, x=BF16, device=cuda)
    with torch.no_grad():
        expected = ops.gelu_mlp(**arguments, implementation="cuda")
        x = torch.zeros_like(arguments["x"])
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            x.copy_(arguments["x"])
            found = ops.gelu_mlp(**arguments | {"x": x}, implementation="cuda")
        stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.gpu
def test_the_operators_name_what_they_do_not_take(cuda):
    x, *parameters = make((5, 16), 24, x=BF16, weights=BF16, device=cuda).values()
    forward = torch.ops.repa_fast.gelu_mlp_forward
    with pytest.raises(RuntimeError, match="gelu_mlp: bias1 has another dtype"):
        forward(x, parameters[0], parameters[1].float(), *parameters[2:])
    with pytest.raises(RuntimeError, match="gelu_mlp: bias2 is not 1 x 16"):
        forward(x, *parameters[:3], parameters[1])
    with pytest.raises(RuntimeError, match="gelu_mlp: weight2 is not on a CUDA device"):
        forward(x, *parameters[:2], parameters[2].cpu(), parameters[3])
