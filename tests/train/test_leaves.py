"""bf16 leaves of fp32 weights, adaLN layers in one matmul, and a residual stream in bf16."""

import copy
import gc
import io
import weakref

import pytest
import torch

from repa_fast.checkpoint.export import export
from repa_fast.train import checkpoint
from repa_fast.train.leaves import JointLinear, LeafLinear
from repa_fast.train.resume import start_from
from repa_fast.train.step import accumulate, draw_local, losses, synthetic_batch, train_step
from tests.train.conftest import assert_same, gradients_of, resumed
from tests.train.runs import assert_same_weights

BF16 = {"mixed_precision": "bf16"}


def batch_of(state):
    torch.manual_seed(0)
    return synthetic_batch(state, 12)[0]


def trained(make_state, steps=3, **overrides):
    state = make_state(**BF16, **overrides)
    for _ in range(steps):
        train_step(state, batch_of(state))
    return state


def gradients(make_state, micro_batch=12, **overrides):
    state = make_state(**BF16 | overrides)
    state.micro_batch = micro_batch
    accumulate(state, batch_of(state), draw_local(state))
    return gradients_of(state)


def leaf_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, LeafLinear)}


def test_linear_layers_have_bf16_weights_and_gradients_and_all_else_is_fp32(make_state):
    state = make_state(**BF16)
    accumulate(state, batch_of(state), draw_local(state))
    layers = leaf_layers(state.model)
    kinds = {type(m) for m in state.model.modules() if isinstance(m, torch.nn.Linear)}
    assert kinds == {LeafLinear} and len(state.optimizer.leaves) == 2 * len(layers) > 20
    leaves = {f"{name}.weight" for name in layers}
    for name, parameter in state.model.named_parameters():
        expected = torch.bfloat16 if name in leaves else torch.float32
        assert parameter.dtype == expected, name
        assert parameter.grad is None or parameter.grad.dtype == expected, name
    train_step(state, batch_of(state))
    assert {t.dtype for t in checkpoint.tensors(state).values()} == {torch.float32}
    assert not leaf_layers(state.ema) and not leaf_layers(make_state().model)
    assert state.model.state_dict().keys() == make_state().model.state_dict().keys()


def test_leaves_are_the_rounded_masters_after_every_step_and_after_a_state_dict(make_state):
    state = trained(make_state)
    for layer in leaf_layers(state.model).values():
        assert torch.equal(layer.weight, layer.master.bfloat16())
        assert torch.equal(layer.bias_copy, layer.bias.bfloat16())
        assert not torch.equal(layer.weight.float(), layer.master)  # it keeps bits below bf16
    start = make_state(**BF16).model.state_dict()
    state.model.load_state_dict(start)
    assert_same(state.model.state_dict().values(), start.values())
    for layer in leaf_layers(state.model).values():
        assert torch.equal(layer.weight, layer.master.bfloat16())
        assert torch.equal(layer.bias_copy, layer.bias.bfloat16())
    wrong = start | {"blocks.0.mlp.fc1.weight": torch.ones(3, 3)}
    with pytest.raises(RuntimeError, match="size mismatch"):
        state.model.load_state_dict(wrong)


def test_no_other_tensors_take_the_places_of_those_that_the_optimizer_has(make_state):
    """One line refuses what would leave it, or the joint adaLN matmul, with tensors of no model."""
    model = make_state(**BF16).model
    assert model.to("cpu") is model
    for attempt in (copy.deepcopy, lambda model: torch.save(model, io.BytesIO())):
        with pytest.raises(TypeError, match=r"copied or pickled: use state_dict\(\)"):
            attempt(model)
    for attempt in (torch.nn.Module.float, torch.nn.Module.bfloat16, lambda m: m.to("meta")):
        with pytest.raises(TypeError, match="stays where it is, in its dtypes"):
            attempt(model)
    with pytest.raises(TypeError, match="weight has a bf16 leaf: load_state_dict without assign"):
        model.load_state_dict(model.state_dict(), assign=True)


def test_gradients_are_those_of_autocast_on_fp32_weights(make_state):
    """To the bit where the layers are the same; sums of biases, and over blocks, are in fp32."""
    state = make_state(**BF16)
    batch, draws = batch_of(state), draw_local(state)
    plain = copy.deepcopy(state.ema).requires_grad_().train()
    plain.pos_embed.requires_grad_(False)
    denoise, (aligned,) = losses(state, plain, batch, draws)
    ((denoise.sum() + state.alignment.weight(0) * aligned.sum()) / 12).backward()
    accumulate(state, batch, draws)
    found, expected = gradients_of(state), dict(plain.named_parameters())
    assert found.keys() == {name for name, p in expected.items() if p.grad is not None}
    for name, gradient in found.items():
        exact, above = expected[name].grad, name.startswith(("t_embedder", "y_embedder"))
        if "adaLN" in name or above or name.endswith(".bias"):
            rounding = 2**-6 * exact.norm() + 1e-6 * ("qkv" in name)  # a key's bias has no gradient
            assert (gradient - exact).norm() <= rounding, name
        else:
            assert torch.equal(gradient.float(), exact), name


def test_micro_batches_are_summed_in_fp32(make_state):
    """Four bf16 gradients, and their sum not rounded to bf16 again."""
    exact = gradients(make_state, mixed_precision="no")
    whole, parts = (gradients(make_state, micro) for micro in (12, 3))
    assert whole.keys() == parts.keys() == exact.keys()

    def error(found):
        differences = [(found[n].double() - exact[n].double()).flatten() for n in exact]
        return torch.cat(differences).norm()

    assert error(parts) < 1.1 * error(whole)
    name = "blocks.0.mlp.fc1.weight"
    assert (whole[name].dtype, parts[name].dtype) == (torch.bfloat16, torch.float32)
    assert not torch.equal(parts[name], parts[name].bfloat16().float())
    in_fp32 = gradients(make_state, 3, mixed_precision="no")
    for n, gradient in in_fp32.items():
        assert (gradient - exact[n]).norm() <= 2e-6 * exact[n].norm() + 1e-9, n


def test_buffers_of_gradients_go_with_their_state(make_state):
    state = make_state(**BF16)
    state.micro_batch = 6
    train_step(state, batch_of(state))
    left = [weakref.ref(one) for one in (state.gradients, *state.model.parameters())]
    del state
    gc.collect()
    assert len(left) > 40 and not [one for one in left if one() is not None]


@pytest.mark.parametrize("official", (False, True), ids=("native", "official"))
def test_a_resumed_run_has_the_same_bits_also_below_those_of_bf16(make_state, tmp_path, official):
    state = trained(make_state)
    source = checkpoint.save(tmp_path / "run", state)
    if official:
        export(source, "official", tmp_path / "0000003.pt")
        source = tmp_path / "0000003.pt"
    other = make_state(**BF16, resume=str(source))
    assert resumed(tmp_path / "none", other) == source
    for each in (other, state):
        fc1 = each.model.blocks[0].mlp.fc1
        assert torch.equal(fc1.weight, fc1.master.bfloat16())
    assert_same_weights(other, state)
    for each in (state, other):
        train_step(each, batch_of(each))
    assert_same_weights(other, state)


def test_a_run_begins_from_fp32_weights(make_state, tmp_path):
    weights = make_state(seed=5).model.state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    state = make_state(**BF16)
    assert start_from(tmp_path / "weights.pt", "repa", state) == []
    for model in (state.model, state.ema):
        assert_same(model.state_dict().values(), weights.values())
    fc1 = state.model.blocks[0].mlp.fc1
    assert torch.equal(fc1.weight, weights["blocks.0.mlp.fc1.weight"].bfloat16())


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.heavy)])
def test_blocks_with_leaves_compile_into_one_graph(make_state, backend):
    state = make_state(**BF16)
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
        assert a.dtype == torch.bfloat16 and torch.equal(a, b)


def test_one_matmul_for_all_adaln_layers_is_their_own():
    """To the rounding of bf16, against fp64 on the same numbers."""
    torch.manual_seed(0)
    layers, width, rows = 3, 32, 5
    x = torch.randn(rows, width).bfloat16().requires_grad_()
    joint = torch.randn(layers * 6 * width, width).bfloat16()
    weights = [part.clone().requires_grad_() for part in joint.chunk(layers)]
    biases = [torch.randn(6 * width, requires_grad=True) for _ in range(layers)]
    y = JointLinear.apply(x, joint, torch.cat(biases).bfloat16(), *weights, *biases)
    upstream = torch.randn_like(y)
    gradients = torch.autograd.grad(y, [x, *weights, *biases], upstream)

    exact = [t.detach().double().requires_grad_() for t in (x, joint)]
    bias = torch.cat(biases).detach().bfloat16().double().requires_grad_()
    expected = exact[0] @ exact[1].t() + bias
    x_grad, w_grad, b_grad = torch.autograd.grad(expected, [*exact, bias], upstream.double())
    close = {"rtol": 2**-8, "atol": 2**-8, "check_dtype": False}  # atol: sums that cancel
    torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(gradients[0], x_grad, rtol=2**-8, atol=2**-3, check_dtype=False)
    for found, part in zip(gradients[1:], (*w_grad.chunk(layers), *b_grad.chunk(layers))):
        assert found.dtype == (torch.bfloat16 if found.ndim == 2 else torch.float32)
        torch.testing.assert_close(found, part, **close)


def test_the_adaln_weights_of_all_blocks_are_one_tensor_that_the_optimizer_writes(make_state):
    state = trained(make_state)
    layers = [block.adaLN_modulation[1] for block in state.model.blocks]
    for layer in layers:
        for part in (layer.weight, layer.bias_copy):
            assert part.untyped_storage().nbytes() == 2 * len(layers) * part.numel()
    c = torch.randn(4, 32)
    with state.autocast():
        for block, found in zip(state.model.blocks, state.model.modulations(c), strict=True):
            expected = block.adaLN_modulation(c)
            assert found.any() and torch.allclose(found, expected, rtol=2**-7, atol=2**-9)


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
