import pytest
import torch

from repa_fast.train import checkpoint
from repa_fast.train.compute_copy import CopiedLinear
from repa_fast.train.step import synthetic_batch, train_step

BF16 = {"mixed_precision": "bf16"}


def trained(make_state, steps=3, **overrides):
    state = make_state(**BF16, **overrides)
    state.optimizer.write_copies()
    for _ in range(steps):
        train_step(state, batch_of(state))
    return state


def batch_of(state):
    torch.manual_seed(0)
    return synthetic_batch(state, 12)[0]


def test_training_is_the_same_to_the_bit(make_state):
    plain = trained(make_state)
    copied = trained(make_state, compute_copy="optimizer")
    layers = [m for m in copied.model.modules() if isinstance(m, CopiedLinear)]
    assert len(layers) == len(copied.optimizer.copies) > 10
    for a, b in zip(plain.model.parameters(), copied.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for layer in layers:
        assert torch.equal(layer.weight_copy, layer.weight.bfloat16())


def test_what_is_computed_with_is_the_copy(make_state):
    state = make_state(compute_copy="optimizer", **BF16)
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
    other = make_state(compute_copy="optimizer", **BF16)
    checkpoint.load(folder, other)
    other.optimizer.write_copies()
    for each in (state, other):
        train_step(each, batch_of(each))
    for a, b in zip(state.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_blocks_with_copies_compile_into_one_graph(make_state):
    state = make_state(compute_copy="optimizer", **BF16)
    block = state.model.blocks[0]
    arguments = torch.randn(2, 16, 32), None, None, torch.randn(2, 6 * 32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for run in (block, compiled):
        with state.autocast():
            x, branch, gate = run(*arguments)
        loss = (x + gate[:, None] * branch).square().sum()
        results.append(torch.autograd.grad(loss, [block.mlp.fc1.weight, block.attn.qkv.weight]))
    for a, b in zip(*results):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("precision", ("no", "fp16", "auto"))
def test_it_needs_bf16(make_state, precision):
    with pytest.raises(ValueError, match="compute_copy is 'optimizer'"):
        make_state(compute_copy="optimizer", mixed_precision=precision)
