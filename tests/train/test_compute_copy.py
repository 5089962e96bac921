"""Copies of the weights in bf16, adaLN layers in one product, and a residual stream in bf16."""

import pytest
import torch

from repa_fast.train import checkpoint
from repa_fast.train.compute_copy import CopiedLinear, JointLinear
from repa_fast.train.step import accumulate, draw_local, synthetic_batch, train_step
from tests.train.conftest import assert_same

BF16 = {"mixed_precision": "bf16"}
COPIES = BF16 | {"compute_copy": "optimizer"}


def trained(make_state, steps=3, **overrides):
    state = make_state(**BF16, **overrides)
    state.optimizer.write_copies()
    for _ in range(steps):
        train_step(state, batch_of(state))
    return state


def batch_of(state):
    torch.manual_seed(0)
    return synthetic_batch(state, 12)[0]


def gradients(make_state, **overrides):
    state = make_state(**BF16, **overrides)
    state.optimizer.write_copies()
    accumulate(state, batch_of(state), draw_local(state))
    return {n: p.grad for n, p in state.model.named_parameters() if p.grad is not None}


def test_training_is_the_same_to_the_bit(make_state):
    plain = trained(make_state)
    copied = trained(make_state, compute_copy="optimizer")
    layers = [m for m in copied.model.modules() if isinstance(m, CopiedLinear)]
    assert len(layers) == len(copied.optimizer.copies) > 10
    assert_same(copied.model.parameters(), plain.model.parameters())
    for layer in layers:
        assert torch.equal(layer.weight_copy, layer.weight.bfloat16())


def test_what_is_computed_with_is_the_copy(make_state):
    state = make_state(**COPIES)
    layer = state.model.blocks[0].mlp.fc1
    layer.weight_copy.zero_()
    x = torch.randn(2, 32)
    with state.autocast():
        assert torch.equal(layer(x), layer.bias.bfloat16().expand(2, -1))
    assert not torch.equal(layer(x), layer.bias.expand(2, -1))


def test_checkpoints_and_averages_hold_no_copies(make_state, tmp_path):
    state = trained(make_state, compute_copy="optimizer")
    assert state.model.state_dict().keys() == make_state().model.state_dict().keys()
    assert not any(isinstance(m, CopiedLinear) for m in state.ema.modules())
    folder = checkpoint.save(tmp_path, state)
    other = make_state(**COPIES)
    checkpoint.load(folder, other)
    other.optimizer.write_copies()
    for each in (state, other):
        train_step(each, batch_of(each))
    assert_same(other.model.parameters(), state.model.parameters())


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.heavy)])
def test_blocks_with_copies_compile_into_one_graph(make_state, backend):
    state = make_state(**COPIES)
    block = state.model.blocks[0]
    arguments = torch.randn(2, 16, 32), None, None, torch.randn(2, 6 * 32)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    results = []
    for run in (block, compiled):
        with state.autocast():
            x, branch, gate = run(*arguments)
        loss = (x + gate[:, None] * branch).square().sum()
        results.append(torch.autograd.grad(loss, [block.mlp.fc1.weight, block.attn.qkv.weight]))
    for a, b in zip(*results):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_one_product_for_all_adaln_layers_is_their_own():
    """To the rounding of bf16, against fp64 on the same numbers."""
    torch.manual_seed(0)
    layers, width, rows = 3, 32, 5
    x = torch.randn(rows, width).bfloat16().requires_grad_()
    weights = [torch.randn(6 * width, width, requires_grad=True) for _ in range(layers)]
    biases = [torch.randn(6 * width, requires_grad=True) for _ in range(layers)]
    copy = torch.cat(weights).detach().bfloat16()
    y = JointLinear.apply(x, copy, *weights, *biases)
    upstream = torch.randn_like(y)
    gradients = torch.autograd.grad(y, [x, *weights, *biases], upstream)

    exact = [t.detach().double().requires_grad_() for t in (x, copy)]
    bias = torch.cat(biases).detach().bfloat16().double().requires_grad_()
    expected = exact[0] @ exact[1].t() + bias
    x_grad, w_grad, b_grad = torch.autograd.grad(expected, [*exact, bias], upstream.double())
    close = {"rtol": 2**-8, "atol": 2**-8, "check_dtype": False}  # atol: sums that cancel
    torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(gradients[0], x_grad, rtol=2**-8, atol=2**-3, check_dtype=False)
    for found, part in zip(gradients[1:], (*w_grad.chunk(layers), *b_grad.chunk(layers))):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, part, **close)


def test_joint_layers_have_the_gradients_of_single_ones(make_state):
    """To the rounding of bf16: the condition's gradient is summed in fp32 instead of bf16."""
    single, joint = (
        gradients(make_state, compute_copy="optimizer", joint_adaln=joint)
        for joint in (False, True)
    )
    assert single.keys() == joint.keys()
    for name, expected in single.items():
        assert (joint[name] - expected).norm() <= 2**-6 * expected.norm(), name


def test_joint_copies_are_one_tensor_that_the_optimizer_writes(make_state):
    """And without autocast the layers compute with their weights."""
    state = trained(make_state, compute_copy="optimizer", joint_adaln=True)
    layers = [block.adaLN_modulation[1] for block in state.model.blocks]
    for layer in layers:
        assert torch.equal(layer.weight_copy, layer.weight.bfloat16())
        size = layer.weight_copy.untyped_storage().nbytes()
        assert size == 2 * len(layers) * layer.weight.numel()
    c = torch.randn(4, 32)
    for block, modulation in zip(state.model.blocks, state.model.modulations(c), strict=True):
        assert torch.equal(modulation, block.adaLN_modulation(c))


def test_a_bf16_residual_stream_is_the_models_alone(make_state):
    state = make_state(**BF16, residual_dtype="bf16")
    seen = []
    state.model.blocks[1].register_forward_hook(lambda block, given, out: seen.append(out[0].dtype))
    accumulate(state, batch_of(state), draw_local(state))
    x, t, y = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 1])
    with state.autocast():
        average = state.ema.hidden(x, t, y, depth=2)
    assert seen == [torch.bfloat16] and average.dtype == torch.float32


def test_a_bf16_residual_stream_rounds_every_addition(make_state):
    """Six of them, each by 2^-9 at most: gradients move by about as much as under autocast."""
    fp32, bf16 = (gradients(make_state, residual_dtype=dtype) for dtype in ("fp32", "bf16"))
    assert fp32.keys() == bf16.keys()
    for name, expected in fp32.items():
        assert 0 < (bf16[name] - expected).norm() <= 2**-4 * expected.norm(), name
