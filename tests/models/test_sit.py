import math

import pytest
import torch

from repa_fast import ops
from repa_fast.models.sit import SiT, SiTBlock
from repa_fast.testing import assert_within_budget, seeded

SMALL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 24,
    "depth": 3,
    "num_heads": 4,
    "encoder_depth": 2,
    "num_classes": 10,
    "z_dims": (5, 7),
    "projector_dim": 11,
}
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def small(dtype=torch.float64, **changes):
    """A small model whose zero-initialised layers are N(0, 0.02), in train mode."""
    torch.manual_seed(0)
    model = SiT(**SMALL | changes)
    for layer in (*model.blocks, model.final_layer):
        for parameter in layer.adaLN_modulation.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    for parameter in model.final_layer.linear.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.to(dtype)


def batch(dtype=torch.float64, labels=(0, 3, 9, 10)):
    x = seeded((4, 3, 8, 8), seed=1, dtype=dtype)
    return x, torch.tensor([0.0, 0.04, 0.5, 1.0], dtype=dtype), torch.tensor(labels)


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def adaln(x, shift, scale):
    return layer_norm(x, 1e-6) * (1 + scale[:, None]) + shift[:, None]


def patchify(x, patch):
    """(B, C, h, w) -> (B, N, C * P * P), values in the order of a convolution's weight."""
    images, _, height, width = x.shape
    rows, columns = height // patch, width // patch
    patches = [
        x[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].reshape(images, -1)
        for r in range(rows)
        for c in range(columns)
    ]
    return torch.stack(patches, dim=1)


def unpatchify(tokens, patch, channels, grid):
    """(B, N, P * P * C), channel last -> (B, C, h, w)."""
    image = tokens.new_zeros(len(tokens), channels, grid * patch, grid * patch)
    for n in range(grid * grid):
        r, c = divmod(n, grid)
        values = tokens[:, n].reshape(-1, patch, patch, channels).movedim(-1, 1)
        image[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] = values
    return image


def attention(state, name, x, heads):
    images, tokens, width = x.shape
    qkv = linear(state, f"{name}.qkv", x).reshape(images, tokens, 3, heads, width // heads)
    q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    if f"{name}.q_norm.weight" in state:
        q = layer_norm(q, 1e-5) * state[f"{name}.q_norm.weight"] + state[f"{name}.q_norm.bias"]
        k = layer_norm(k, 1e-5) * state[f"{name}.k_norm.weight"] + state[f"{name}.k_norm.bias"]
    weights = torch.exp(q @ k.transpose(-1, -2) / math.sqrt(width // heads))
    out = (weights / weights.sum(-1, keepdim=True)) @ v
    return linear(state, f"{name}.proj", out.transpose(1, 2).reshape(x.shape))


def condition(state, t, y):
    frequencies = torch.exp(-math.log(1e4) * torch.arange(128, dtype=t.dtype) / 128)
    angles = t[:, None] * frequencies
    features = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
    hidden = silu(linear(state, "t_embedder.mlp.0", features))
    return linear(state, "t_embedder.mlp.2", hidden) + state["y_embedder.embedding_table.weight"][y]


def functional_sit(state, x, t, y, *, heads=4):
    """(velocity, hidden state after each block) from the weights alone."""
    kernel = state["x_embedder.proj.weight"]
    patch, channels, grid = kernel.shape[-1], x.shape[1], x.shape[-1] // kernel.shape[-1]
    h = patchify(x, patch) @ kernel.flatten(1).T + state["x_embedder.proj.bias"]
    h = h + state["pos_embed"]
    c = silu(condition(state, t, y))
    hidden = []
    while (name := f"blocks.{len(hidden)}") + ".attn.qkv.weight" in state:
        modulation = linear(state, f"{name}.adaLN_modulation.1", c).chunk(6, dim=1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        h = h + gate_a[:, None] * attention(
            state, f"{name}.attn", adaln(h, shift_a, scale_a), heads
        )
        wide = gelu_tanh(linear(state, f"{name}.mlp.fc1", adaln(h, shift_m, scale_m)))
        h = h + gate_m[:, None] * linear(state, f"{name}.mlp.fc2", wide)
        hidden.append(h)
    shift, scale = linear(state, "final_layer.adaLN_modulation.1", c).chunk(2, dim=1)
    tokens = linear(state, "final_layer.linear", adaln(h, shift, scale))
    return unpatchify(tokens, patch, channels, grid), hidden


def project(state, index, x):
    for layer in (0, 2):
        x = silu(linear(state, f"projectors.{index}.{layer}", x))
    return linear(state, f"projectors.{index}.4", x)


@pytest.mark.parametrize(
    "changes",
    (
        {},
        {"qk_norm": True},
        {"fused_attn": False},
        {"fused_attn": False, "qk_norm": True},
        {"encoder_depth": 1},
        {"encoder_depth": 3},
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


def test_fused_attention_equals_the_explicit_softmax():
    fused, explicit = small(), small(fused_attn=False)
    assert fused.blocks[0].attn.fused_attn and not explicit.blocks[0].attn.fused_attn
    torch.testing.assert_close(fused(*batch()), explicit(*batch()), **EXACT)


def test_drop_mask_equals_passing_the_null_label():
    model = small()
    x, t, y = batch()
    drop = torch.tensor([True, False, True, False])
    by_mask = model(x, t, y, drop)
    by_label = model(x, t, torch.tensor([10, 3, 10, 10]))
    torch.testing.assert_close(by_mask, by_label, rtol=0, atol=0)
    assert not torch.equal(by_mask[0][0], model(x, t, y)[0][0])


def test_without_a_mask_no_label_is_dropped_in_train_mode():
    x, t, _ = batch()
    y = torch.zeros(4, dtype=torch.int64)
    always = small(class_dropout_prob=1.0).train()
    assert torch.equal(always(x, t, y)[0], always.eval()(x, t, y)[0])


def test_projectors_do_not_run_in_eval_mode():
    model = small().eval()
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


def test_running_the_projectors_leaves_the_velocity_as_it_is():
    model = small()
    torch.testing.assert_close(model(*batch())[0], model.eval()(*batch())[0], **EXACT)


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


def test_blocks_compile_into_one_graph_each_and_equal_eager():
    torch._dynamo.reset()
    eager, compiled = small(torch.float32), small(torch.float32)
    for block in compiled.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    args = batch(torch.float32)
    torch.testing.assert_close(compiled(*args), eager(*args), rtol=0, atol=0)
    gradients = []
    for model in (compiled, small(torch.float64), eager):
        dtype = model.pos_embed.dtype
        model(*(v.to(dtype) if v.is_floating_point() else v for v in args))[0].sum().backward()
        gradients.append([p.grad for p in model.blocks.parameters()])
    names = [name for name, _ in eager.blocks.named_parameters()]
    for name, *actual_oracle_working in zip(names, *gradients):
        assert_within_budget(name, *actual_oracle_working)


def block_arguments():
    block = SiTBlock(24, 4, 4.0, qk_norm=False, fused_attn=True).double()
    x, branch = (seeded((2, 6, 24), seed=seed, dtype=torch.float64) for seed in (1, 2))
    gate, modulation = (
        seeded((2, width), seed=3, dtype=torch.float64, std=0.1) for width in (24, 144)
    )
    return block, x, branch, gate, modulation


def test_nothing_pending_equals_a_pending_branch_with_zero_gate():
    block, x, branch, gate, modulation = block_arguments()
    nothing = block(x, None, None, modulation)
    torch.testing.assert_close(
        block(x, branch, torch.zeros_like(gate), modulation), nothing, **EXACT
    )


def test_a_pending_branch_is_added_before_the_block():
    block, x, branch, gate, modulation = block_arguments()
    resolved = block(x + gate[:, None] * branch, None, None, modulation)
    torch.testing.assert_close(block(x, branch, gate, modulation), resolved, **EXACT)


def test_a_block_hands_its_mlp_branch_and_gate_on_unadded():
    block, x, _, _, modulation = block_arguments()
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
    new, branch, gate = block(x, None, None, modulation)
    state = {f"b.{name}": value for name, value in block.state_dict().items()}
    expected = x + gate_a[:, None] * attention(state, "b.attn", adaln(x, shift_a, scale_a), 4)
    torch.testing.assert_close(new, expected, **EXACT)
    wide = gelu_tanh(linear(state, "b.mlp.fc1", adaln(expected, shift_m, scale_m)))
    torch.testing.assert_close(branch, linear(state, "b.mlp.fc2", wide), **EXACT)
    assert torch.equal(gate, gate_m)


@pytest.mark.parametrize(
    "changes, parts",
    (
        ({"encoder_depth": 4}, ("encoder_depth", "4", "1..3")),
        ({"encoder_depth": 0}, ("encoder_depth", "0", "1..3")),
        ({"patch_size": 3}, ("patch_size", "3", "8")),
        ({"num_heads": 5}, ("num_heads", "5", "24")),
    ),
)
def test_sizes_that_do_not_fit_are_named(changes, parts):
    with pytest.raises(ValueError) as error:
        SiT(**SMALL | changes)
    assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize("label", (-1, 11))
def test_labels_out_of_range_are_named(label):
    with pytest.raises(ValueError, match="labels") as error:
        small()(*batch(labels=(0, 1, 2, label)))
    assert str(label) in str(error.value) and "[0, 10]" in str(error.value)


@pytest.mark.parametrize("shape", ((4, 4, 8, 8), (4, 3, 16, 16), (4, 3, 8)))
def test_latents_of_another_shape_are_named(shape):
    with pytest.raises(ValueError, match="latents") as error:
        small()(torch.zeros(shape, dtype=torch.float64), *batch()[1:])
    assert str(shape) in str(error.value) and "3, 8, 8" in str(error.value)


def test_every_block_gets_a_residual_of_one_layout():
    """Compiled blocks are one graph for each layout."""
    model, strides = small(z_dims=()), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: strides.append(inputs[0].stride()))
    x, t, y = batch()
    model(x, t, y)
    assert strides == [(16 * 24, 24, 1)] * 3
