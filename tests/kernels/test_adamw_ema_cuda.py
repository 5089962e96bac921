"""What the kernels of csrc promise beside what the reference does (test_adamw_ema.py)."""

import pytest
import torch

from repa_fast import ops
from tests.kernels.adamw import (
    ODD_SHAPES,
    advance,
    assert_equal,
    assert_follows_formula,
    make,
    make_gradients,
)
from tests.kernels.table import BF16, F32

pytestmark = pytest.mark.gpu


def squares(tensors, device):
    return ops.sum_of_squares(tensors, device, implementation="cuda")


@pytest.mark.parametrize("count", (319, 320, 321, 700))
def test_more_tensors_than_one_launch_are_taken(cuda, count):
    shapes = [((i * 37) % 101,) for i in range(count - 1)] + [(20_000,)]
    assert_follows_formula("cuda", shapes, 3, dtypes=(F32, BF16), copies=True)


def test_a_tensor_that_is_not_taken_is_named(cuda):
    shapes = ((4, 6), (3,))
    grads = make_gradients(shapes, 1, "cuda")
    harms = {
        "exp_avgs": lambda t: t.cpu(),
        "exp_avg_sqs": lambda t: t.double(),
        "emas": lambda t: t.t().contiguous().t(),
        "param_copies": lambda t: t.half(),
        "params": lambda t: t.bfloat16(),
        "steps": lambda t: t.long(),
    }
    for name, harm in harms.items():
        broken = make(shapes, "cuda", copies=True)
        broken[name][0] = harm(broken[name][0])
        with pytest.raises(RuntimeError, match=rf"adamw_ema: {name}\[0\]"):
            advance(broken, grads, "cuda")
    with pytest.raises(RuntimeError, match=r"adamw_ema: grads\[1\]"):
        advance(make(shapes, "cuda", copies=True), [grads[0], grads[1].half()], "cuda")
    one = torch.ones((), device=cuda)
    options = {"lr": one, "grad_scale": one, "skip": 0 * one, "betas": (0.9, 0.99), "eps": 1e-8}
    options |= {"weight_decay": 0.1, "implementation": "cuda"}
    for rate in (torch.ones(()), one.double(), torch.ones(2, device=cuda)):
        with pytest.raises(RuntimeError, match=r"adamw_ema: ema_rate\[0\]"):
            ops.adamw_ema(grads=grads, ema_rate=rate, **make(shapes, "cuda"), **options)
    with pytest.raises(RuntimeError, match=r"sum_of_squares: grads\[1\]"):
        squares([grads[0], grads[1].double()], cuda)
    with pytest.raises((ValueError, RuntimeError), match="grads"):  # as large, of another shape
        advance(make(((4, 6),), "cuda"), make_gradients(((6, 4),), 1, "cuda"), "cuda")


def test_kernels_are_captured_and_replayed(cuda):
    """Rates, scale, skip and gradients are read at replay, not at capture."""
    shapes = [*ODD_SHAPES, *((5,),) * 330]
    captured, eager = make(shapes, "cuda"), make(shapes, "cuda")
    static = make_gradients(shapes, 0, "cuda")
    scalars = {"lr": 0.0, "grad_scale": 1.0, "skip": 0.0, "ema_rate": 1.0}
    scalars = {name: torch.tensor(value, device=cuda) for name, value in scalars.items()}
    options = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    squares(static, cuda)
    advance(make(shapes, "cuda"), static, "cuda")  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = squares(static, cuda)
        ops.adamw_ema(grads=static, **captured, **scalars, **options, implementation="cuda")
    for step in range(1, 5):
        grads = make_gradients(shapes, step, "cuda")
        for a, b in zip(static, grads, strict=True):
            a.copy_(b)
        values = {"lr": 0.1 / step, "grad_scale": 0.5 * step, "skip": float(step == 3)}
        values |= {"ema_rate": 1 / step}
        for name, value in values.items():
            scalars[name].fill_(value)
        graph.replay()
        advance(eager, grads, "cuda", **values, **options)
        assert torch.equal(found, squares(grads, cuda))
    assert_equal(captured, eager)


def test_kernels_run_on_the_current_stream(cuda):
    shapes = ((100_000,),)
    lists, expected = make(shapes, "cuda"), make(shapes, "cuda")
    grads, values = [torch.zeros(shapes[0], device=cuda)], make_gradients(shapes, 1, "cuda")
    advance(expected, values, "cuda")
    exact = squares(values, cuda)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        grads[0].copy_(values[0])
        found = squares(grads, cuda)
        advance(lists, grads, "cuda")
    stream.synchronize()
    assert_equal(lists, expected)
    assert torch.equal(found, exact)


def test_kernels_run_on_the_tensors_device(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = torch.device("cuda", 1)
    here, grads = make(ODD_SHAPES, "cuda"), make_gradients(ODD_SHAPES, 1, "cuda")
    there = {name: [t.to(other) for t in tensors] for name, tensors in here.items()}
    advance(there, [grad.to(other) for grad in grads], "cuda")
    advance(here, grads, "cuda")
    assert torch.cuda.current_device() == 0
    assert_equal({n: [t.to(cuda) for t in ts] for n, ts in there.items()}, here)
    mixed = make(((3,), (3,)), "cuda")
    mixed["params"][1] = mixed["params"][1].to(other)
    with pytest.raises(RuntimeError, match=r"params\[1\] is on device 1, expected 0"):
        advance(mixed, make_gradients(((3,), (3,)), 1, "cuda"), "cuda")


@pytest.mark.usefixtures("heavy")
def test_a_tensor_above_2_to_the_31_elements_is_taken(cuda):
    count = 2**31 + 8195
    if torch.cuda.mem_get_info(cuda)[0] < count * 24:
        pytest.skip(f"needs {count * 24 / 2**30:.0f} GiB of free device memory")
    names = ("params", "exp_avgs", "exp_avg_sqs", "emas")
    lists = {name: [torch.zeros(count, device=cuda)] for name in names}
    lists |= {"steps": [torch.zeros((), device=cuda)]}
    grad = torch.zeros(count, dtype=BF16, device=cuda)
    places = [0, 8191, 2**31 - 1, 2**31, 2**31 + 8191, count - 1]
    grad[places] = torch.arange(1, 7, dtype=BF16, device=cuda)
    assert squares([grad], cuda).item() == 91
    advance(lists, [grad], "cuda", ema_rate=0.5)
    for name, expected in (("params", -0.01), ("emas", -0.005)):
        assert lists[name][0].count_nonzero().item() == len(places)
        assert lists[name][0][places].tolist() == pytest.approx([expected] * 6, rel=1e-5)
