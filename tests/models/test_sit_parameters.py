import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from repa_fast.models.embed import sincos_position_embedding
from repa_fast.models.sit import SiT, size
from repa_fast.testing import seeded

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


COUNTS = {  # without and with one 768-d projector
    "SiT-S/2": (32_957_200, 39_515_664),
    "SiT-B/2": (130_500_112, 137_845_008),
    "SiT-L/2": (458_086_416, 465_955_600),
    "SiT-XL/2": (675_111_184, 683_242_512),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_official_ones(name):
    with FakeTensorMode():  # shapes without memory
        models = [SiT(**size(name), z_dims=z_dims) for z_dims in ((), (768,))]
    assert tuple(sum(p.numel() for p in m.parameters()) for m in models) == COUNTS[name]


def block_names(index, qk_norm=False):
    norms = ["attn.q_norm", "attn.k_norm"] if qk_norm else []
    layers = ["attn.qkv", *norms, "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    return [f"blocks.{index}.{layer}" for layer in layers]


def parameter_names(depth, projectors, qk_norm=False):
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    tail = [name for i in range(depth) for name in block_names(i, qk_norm)]
    tail += [f"projectors.{k}.{layer}" for k in range(projectors) for layer in (0, 2, 4)]
    tail += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    names += ["y_embedder.embedding_table.weight"]
    names += [f"{layer}.{kind}" for layer in tail for kind in ("weight", "bias")]
    return ["pos_embed", *names]


@pytest.mark.parametrize("qk_norm", (False, True))
def test_parameters_have_the_official_names_in_the_official_order(qk_norm):
    changes = {"depth": 1, "encoder_depth": 1, "z_dims": (5,), "qk_norm": qk_norm}
    model = SiT(**SMALL | changes)
    expected = parameter_names(1, 1, qk_norm)
    assert [name for name, _ in model.named_parameters()] == expected
    assert set(model.state_dict()) == set(expected)


def test_only_pos_embed_is_frozen_and_it_comes_first():
    frozen = [i for i, p in enumerate(SiT(**SMALL).parameters()) if not p.requires_grad]
    assert frozen == [0]


def test_state_has_the_official_shapes():
    state = SiT(**SMALL | {"depth": 1, "encoder_depth": 1, "qk_norm": True}).state_dict()
    D, N, C, P, classes = 24, 16, 3, 2, 10
    expected = {
        "pos_embed": (1, N, D),
        "x_embedder.proj.weight": (D, C, P, P),
        "t_embedder.mlp.0.weight": (D, 256),
        "t_embedder.mlp.2.weight": (D, D),
        "y_embedder.embedding_table.weight": (classes + 1, D),
        "blocks.0.attn.qkv.weight": (3 * D, D),
        "blocks.0.attn.q_norm.weight": (D // 4,),
        "blocks.0.attn.proj.weight": (D, D),
        "blocks.0.mlp.fc1.weight": (4 * D, D),
        "blocks.0.mlp.fc2.weight": (D, 4 * D),
        "blocks.0.adaLN_modulation.1.weight": (6 * D, D),
        "projectors.1.0.weight": (11, D),
        "projectors.1.2.weight": (11, 11),
        "projectors.1.4.weight": (7, 11),
        "final_layer.linear.weight": (P * P * C, D),
        "final_layer.adaLN_modulation.1.weight": (2 * D, D),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected


def test_velocity_is_exactly_zero_at_initialisation():
    model = SiT(**SMALL)
    x = seeded((4, 3, 8, 8), seed=1)
    velocity, projections = model(x, torch.linspace(0, 1, 4), torch.arange(4))
    assert velocity.shape == x.shape and not velocity.any()
    assert all(p.any() for p in projections)


@pytest.mark.parametrize(
    "name", ("y_embedder.embedding_table", "t_embedder.mlp.0", "t_embedder.mlp.2")
)
def test_embeddings_start_as_normal_numbers_of_std_0_02(name):
    torch.manual_seed(0)
    model = SiT(**SMALL | {"hidden_size": 128, "depth": 2, "num_classes": 500})
    weight = model.get_parameter(f"{name}.weight").double().flatten()
    standard_error = 0.02 / math.sqrt(len(weight))
    assert abs(weight.mean()) < 5 * standard_error
    assert abs(weight.std() - 0.02) < 5 * standard_error / math.sqrt(2)
    inside = (weight.abs() < 0.02).double().mean()  # 0.6827 for a normal distribution
    assert abs(inside - math.erf(math.sqrt(0.5))) < 5 * math.sqrt(0.2166 / len(weight))


@pytest.mark.parametrize(
    "name, fans",
    (
        ("x_embedder.proj", (3 * 2 * 2, 128)),
        ("blocks.0.attn.qkv", (128, 3 * 128)),
        ("blocks.1.attn.proj", (128, 128)),
        ("blocks.0.mlp.fc1", (128, 512)),
        ("blocks.0.mlp.fc2", (512, 128)),
        ("projectors.0.0", (128, 96)),
        ("projectors.0.4", (96, 64)),
    ),
)
def test_linear_layers_start_xavier_uniform_with_zero_bias(name, fans):
    torch.manual_seed(0)
    model = SiT(**SMALL | {"hidden_size": 128, "depth": 2, "projector_dim": 96, "z_dims": (64,)})
    weight = model.get_parameter(f"{name}.weight").double().flatten()
    bound = math.sqrt(6 / sum(fans))
    assert 0.98 * bound < weight.abs().max() <= bound * (1 + 1e-6)
    # sample variance of a uniform distribution: relative standard error sqrt(0.8 / n)
    assert abs(weight.var() / (bound**2 / 3) - 1) < 5 * math.sqrt(0.8 / len(weight))
    assert not model.get_parameter(f"{name}.bias").any()


@pytest.mark.parametrize("row, column", ((0, 0), (0, 5), (5, 0), (2, 7), (7, 7)))
def test_position_table_encodes_column_then_row_as_sines_then_cosines(row, column):
    width, grid = 24, 8
    entry = sincos_position_embedding(width, grid)[0, row * grid + column]
    omega = [10000 ** -(i / (width // 4)) for i in range(width // 4)]
    expected = [f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in omega]
    expected = torch.tensor(expected, dtype=torch.float64)
    one_rounding = torch.finfo(torch.float32).eps / 2
    torch.testing.assert_close(entry.double(), expected, rtol=one_rounding, atol=1e-15)


def test_model_holds_the_position_table():
    expected = sincos_position_embedding(24, 4)
    assert torch.equal(SiT(**SMALL).pos_embed, expected) and expected.dtype == torch.float32


@pytest.mark.parametrize("name", ("SiT-XL/3", "SiT-H/2", "DiT-XL/3", ""))
def test_an_unknown_size_is_named_with_the_known_ones(name):
    with pytest.raises(ValueError) as error:
        size(name)
    assert repr(name) in str(error.value) and "SiT-XL/2" in str(error.value)


def test_sizes_are_the_papers():
    known = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
    for letter, (depth, width, heads) in known.items():
        for patch in (2, 4, 8):
            assert size(f"SiT-{letter}/{patch}") == {
                "depth": depth,
                "hidden_size": width,
                "num_heads": heads,
                "patch_size": patch,
            }
