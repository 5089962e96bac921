from functools import partial

import pytest
import torch

from repa_fast import ops
from repa_fast.models.sit import SiT, SiTBlock, run_blocks
from repa_fast.testing import assert_within_budget, randomise, seeded
from tests.models.plain import SMALL, adaln, attention, functional_sit, mlp, project
from tests.refusals import refused

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def small(dtype=torch.float64, **changes):
    """A small model whose zero-initialised layers are N(0, 0.02), in train mode."""
    torch.manual_seed(0)
    model = SiT(**SMALL | changes)
    randomise(model)
    return model.to(dtype)


def batch(dtype=torch.float64, labels=(0, 3, 9, 10)):
    x = seeded((4, 3, 8, 8), seed=1, dtype=dtype)
    return x, torch.tensor([0.0, 0.04, 0.5, 1.0], dtype=dtype), torch.tensor(labels)


@pytest.mark.parametrize(
    "changes",
    (
        {},
        {"qk_norm": True, "encoder_depth": 1},
        {"fused_attn": False, "encoder_depth": 3},
        {"fused_attn": False, "qk_norm": True},
        {"patch_size": 4, "mlp_ratio": 2.5},
    ),
)
def test_velocity_and_projections_follow_the_formulas(changes):
    model = small(**changes)
    for block in model.blocks if "qk_norm" in changes else ():
        for parameter in (*block.attn.q_norm.parameters(), *block.attn.k_norm.parameters()):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.5)
    x, t, y = batch()
    velocity, projections = model(x, t, y)
    expected, hidden = functional_sit(model.state_dict(), x, t, y)
    assert expected.std() > 1e-3
    torch.testing.assert_close(velocity, expected, **EXACT)
    aligned = hidden[model.encoder_depth - 1]
    for index, projection in enumerate(projections):
        torch.testing.assert_close(projection, project(model.state_dict(), index, aligned), **EXACT)
    assert [p.shape[-1] for p in projections] == [5, 7]
    assert {block.attn.fused_attn for block in model.blocks} == {"fused_attn" not in changes}


def test_drop_mask_equals_passing_the_null_label():
    model = small()
    x, t, y = batch()
    drop = torch.tensor([True, False, True, False])
    by_mask = model(x, t, y, drop)
    by_label = model(x, t, torch.tensor([10, 3, 10, 10]))
    torch.testing.assert_close(by_mask, by_label, rtol=0, atol=0)
    assert not torch.equal(by_mask[0][0], model(x, t, y)[0][0])


def test_without_a_mask_no_label_is_dropped_in_train_mode():
    always = small(class_dropout_prob=1.0)
    assert torch.equal(always(*batch())[0], always.eval()(*batch())[0])


def test_projectors_do_not_run_in_eval_mode_which_leaves_the_velocity_as_it_is():
    model = small()
    torch.testing.assert_close(model(*batch())[0], model.eval()(*batch())[0], **EXACT)
    calls = []
    for projector in model.projectors:
        projector.register_forward_hook(lambda *_: calls.append(1))
    assert model(*batch())[1] == [] and not calls
    assert len(model(*batch(), project=True)[1]) == len(calls) == 2
    assert model.train()(*batch(), project=False)[1] == [] and len(calls) == 2


def test_a_model_without_projectors_gives_the_same_velocity():
    with_projectors, without = small(), small(z_dims=(), encoder_depth=99)
    state = {k: v for k, v in with_projectors.state_dict().items() if "projectors" not in k}
    without.load_state_dict(state)
    velocity, projections = without(*batch())
    assert projections == []
    torch.testing.assert_close(velocity, with_projectors(*batch())[0], **EXACT)


@pytest.mark.parametrize("encoder_depth", (1, 2))
def test_alignment_reaches_no_block_after_the_alignment_depth(encoder_depth):
    model = small(encoder_depth=encoder_depth)
    target = seeded((4, 16, 5), seed=2, dtype=torch.float64)
    ops.align_loss(model(*batch())[1][0], target).sum().backward()
    late = (*model.blocks[encoder_depth:].parameters(), *model.final_layer.parameters())
    assert all(p.grad is None or not p.grad.any() for p in late)
    early = dict(model.blocks[:encoder_depth].named_parameters())
    for part in ("x_embedder", "t_embedder", "y_embedder"):
        early |= dict(getattr(model, part).named_parameters(prefix=part))
    assert [name for name, p in early.items() if p.grad is None or not p.grad.any()] == []


def test_velocity_loss_reaches_every_parameter_but_projectors_and_pos_embed():
    model = small()
    model(*batch())[0].square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == [n for n, _ in model.named_parameters() if n.startswith(("pos_", "proj"))]


def test_autocast_keeps_the_stream_in_fp32_and_the_branches_in_bf16():
    model = small(torch.float32)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity, projections = model(*batch(torch.float32))
    for (x, branch, *_), (new, new_branch, _) in seen:
        assert x.dtype == new.dtype == torch.float32 and new_branch.dtype == torch.bfloat16
        assert branch is None or branch.dtype == torch.bfloat16
    assert [branch is None for (_, branch, *_), _ in seen] == [True, False, True]
    assert velocity.dtype == torch.float32
    assert [p.dtype for p in projections] == [torch.bfloat16] * 2


def test_blocks_that_run_as_one_do_what_they_do_one_by_one():
    sizes = {"depth": 4, "encoder_depth": 2}
    alone, joined = small(**sizes), small(**sizes)
    joined.region = 2
    calls = []

    def run(blocks, x, branch, *rest):
        calls.append((len(blocks), branch is None))
        return run_blocks(blocks, x, branch, *rest)

    joined.run_region = run
    for found, expected in zip(joined(*batch())[1], alone(*batch())[1], strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(joined(*batch())[0], alone(*batch())[0])
    assert calls == [(2, True), (2, True)] * 2  # nothing is pending after the hidden state


@pytest.mark.usefixtures("heavy")
def test_blocks_compile_into_one_graph_each_and_equal_eager():
    torch._dynamo.reset()
    sizes = {"depth": 2, "z_dims": ()}  # the second block has a branch pending
    eager, compiled, exact = (
        small(dtype, **sizes) for dtype in (*[torch.float32] * 2, torch.double)
    )
    for block in compiled.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    args = batch(torch.float32)
    torch.testing.assert_close(compiled(*args), eager(*args), rtol=0, atol=0)
    gradients = []
    for model in (compiled, exact, eager):
        dtype = model.pos_embed.dtype
        model(*(v.to(dtype) if v.is_floating_point() else v for v in args))[0].sum().backward()
        gradients.append([p.grad for p in model.blocks.parameters()])
    names = [name for name, _ in eager.blocks.named_parameters()]
    for name, *actual_oracle_working in zip(names, *gradients):
        assert_within_budget(name, *actual_oracle_working)


def test_a_block_adds_what_is_pending_first_and_hands_its_own_mlp_branch_and_gate_on_unadded():
    block = SiTBlock(24, 4, 4.0, qk_norm=False, fused_attn=True).double()
    x, branch = (seeded((2, 6, 24), seed=seed, dtype=torch.float64) for seed in (1, 2))
    gate, modulation = (
        seeded((2, width), seed=3, dtype=torch.float64, std=0.1) for width in (24, 144)
    )
    resolved = block(x + gate[:, None] * branch, None, None, modulation)
    torch.testing.assert_close(block(x, branch, gate, modulation), resolved, **EXACT)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
    new, branch, gate = block(x, None, None, modulation)
    state = {f"b.{name}": value for name, value in block.state_dict().items()}
    expected = x + gate_a[:, None] * attention(state, "b.attn", adaln(x, shift_a, scale_a))
    torch.testing.assert_close(new, expected, **EXACT)
    wide = mlp(state, "b.mlp", adaln(expected, shift_m, scale_m))
    torch.testing.assert_close(branch, wide, **EXACT)
    assert torch.equal(gate, gate_m)


def call_with(shape=None, label=9):
    x, t, y = batch(labels=(0, 1, 2, label))
    return small()(x if shape is None else torch.zeros(shape, dtype=x.dtype), t, y)


@pytest.mark.parametrize(
    "call, words",
    (
        (partial(small, encoder_depth=4), ("encoder_depth", "4", "1..3")),
        (partial(small, encoder_depth=0), ("encoder_depth", "0", "1..3")),
        (partial(small, patch_size=3), ("patch_size", "3", "8")),
        (partial(small, num_heads=5), ("num_heads", "5", "24")),
        (partial(call_with, label=-1), ("labels", "-1", r"\[0, 10\]")),
        (partial(call_with, label=11), ("labels", "11", r"\[0, 10\]")),
        (partial(call_with, (4, 4, 8, 8)), ("latents", r"\(4, 4, 8, 8\)", "3, 8, 8")),
        (partial(call_with, (4, 3, 16, 16)), ("latents", r"\(4, 3, 16, 16\)", "3, 8, 8")),
        (partial(call_with, (4, 3, 8)), ("latents", r"\(4, 3, 8\)", "3, 8, 8")),
    ),
)
def test_what_does_not_fit_is_named(call, words):
    refused(call, *words)


def test_every_block_gets_a_residual_of_one_layout():
    """Compiled blocks are one graph for each layout."""
    model, strides = small(z_dims=()), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: strides.append(inputs[0].stride()))
    model(*batch())
    assert strides == [(16 * 24, 24, 1)] * 3
