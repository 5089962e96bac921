import math

import pytest
import torch

from repa_fast.models.embed import sincos_position_embedding
from repa_fast.models.sit import SiT, size
from repa_fast.testing import seeded
from tests.models.plain import SMALL
from tests.refusals import refused

SIZES = {  # depth, width, heads; parameters without and with one 768-d projector
    "S": (12, 384, 6, 32_957_200, 39_515_664),
    "B": (12, 768, 12, 130_500_112, 137_845_008),
    "L": (24, 1024, 16, 458_086_416, 465_955_600),
    "XL": (28, 1152, 16, 675_111_184, 683_242_512),
}


@pytest.mark.parametrize("letter", SIZES)
def test_sizes_are_the_papers_and_parameter_counts_the_official_ones(letter):
    depth, width, heads, *counts = SIZES[letter]
    expected = {"depth": depth, "hidden_size": width, "num_heads": heads}
    for patch in (2, 4, 8):
        assert size(f"SiT-{letter}/{patch}") == expected | {"patch_size": patch}
    with torch.device("meta"):  # shapes without memory
        model = SiT(**size(f"SiT-{letter}/2"), z_dims=(768,))
    whole, head = (sum(p.numel() for p in part.parameters()) for part in (model, model.projectors))
    assert [whole - head, whole] == counts


@pytest.mark.parametrize("qk_norm", (False, True))
def test_parameters_have_the_official_names_and_shapes_in_the_official_order(qk_norm):
    D, N, C, P, classes = 24, 16, 3, 2, 10
    norms = {"attn.q_norm": (D // 4,), "attn.k_norm": (D // 4,)} if qk_norm else {}
    block = {"attn.qkv": (3 * D, D), **norms, "attn.proj": (D, D)}
    block |= {"mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D), "adaLN_modulation.1": (6 * D, D)}
    layers = {"x_embedder.proj": (D, C, P, P)}
    layers |= {"t_embedder.mlp.0": (D, 256), "t_embedder.mlp.2": (D, D)}
    layers |= {"y_embedder.embedding_table": (classes + 1, D)}
    layers |= {f"blocks.0.{name}": shape for name, shape in block.items()}
    for k, width in enumerate((5, 7)):
        shapes = {0: (11, D), 2: (11, 11), 4: (width, 11)}
        layers |= {f"projectors.{k}.{name}": shape for name, shape in shapes.items()}
    layers |= {"final_layer.linear": (P * P * C, D), "final_layer.adaLN_modulation.1": (2 * D, D)}
    expected = {"pos_embed": (1, N, D)}
    for name, shape in layers.items():
        expected[f"{name}.weight"] = shape
        if name != "y_embedder.embedding_table":
            expected[f"{name}.bias"] = shape[:1]
    model = SiT(**SMALL | {"depth": 1, "encoder_depth": 1, "qk_norm": qk_norm})
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert list(found.items()) == list(expected.items())
    assert set(model.state_dict()) == set(expected)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]


def test_the_initial_model_gives_zero_and_holds_the_position_table():
    model = SiT(**SMALL)
    table = sincos_position_embedding(24, 4)
    assert torch.equal(model.pos_embed, table) and table.dtype == torch.float32
    x = seeded((4, 3, 8, 8), seed=1)
    velocity, projections = model(x, torch.linspace(0, 1, 4), torch.arange(4))
    assert velocity.shape == x.shape and not velocity.any()
    assert all(p.any() for p in projections)


@pytest.fixture(scope="module")
def fresh():
    """A model as it is made, with weights large enough for statistics of them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "depth": 2, "num_classes": 500}
    return SiT(**SMALL | sizes | {"projector_dim": 96, "z_dims": (64,)})


def test_embeddings_start_as_normal_numbers_of_std_0_02(fresh):
    for name in ("y_embedder.embedding_table", "t_embedder.mlp.0", "t_embedder.mlp.2"):
        weight = fresh.get_parameter(f"{name}.weight").double().flatten()
        standard_error = 0.02 / math.sqrt(len(weight))
        assert abs(weight.mean()) < 5 * standard_error, name
        assert abs(weight.std() - 0.02) < 5 * standard_error / math.sqrt(2), name
        inside = (weight.abs() < 0.02).double().mean()  # 0.6827 for a normal distribution
        assert abs(inside - math.erf(math.sqrt(0.5))) < 5 * math.sqrt(0.2166 / len(weight)), name


@pytest.mark.parametrize(
    "name, fans",
    (
        ("x_embedder.proj", 3 * 2 * 2 + 128),
        ("blocks.0.attn.qkv", 128 + 3 * 128),
        ("blocks.1.attn.proj", 128 + 128),
        ("blocks.0.mlp.fc1", 128 + 512),
        ("blocks.0.mlp.fc2", 512 + 128),
        ("projectors.0.0", 128 + 96),
        ("projectors.0.4", 96 + 64),
    ),
)
def test_linear_layers_start_xavier_uniform_with_zero_bias(fresh, name, fans):
    weight = fresh.get_parameter(f"{name}.weight").double().flatten()
    bound = math.sqrt(6 / fans)
    assert 0.98 * bound < weight.abs().max() <= bound * (1 + 1e-6)
    # sample variance of a uniform distribution: relative standard error sqrt(0.8 / n)
    assert abs(weight.var() / (bound**2 / 3) - 1) < 5 * math.sqrt(0.8 / len(weight))
    assert not fresh.get_parameter(f"{name}.bias").any()


@pytest.mark.parametrize("row, column", ((0, 0), (0, 5), (5, 0), (2, 7), (7, 7)))
def test_position_table_encodes_column_then_row_as_sines_then_cosines(row, column):
    width, grid = 24, 8
    entry = sincos_position_embedding(width, grid)[0, row * grid + column]
    omega = [10000 ** -(i / (width // 4)) for i in range(width // 4)]
    expected = [f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in omega]
    expected = torch.tensor(expected, dtype=torch.float64)
    one_rounding = torch.finfo(torch.float32).eps / 2
    torch.testing.assert_close(entry.double(), expected, rtol=one_rounding, atol=1e-15)


@pytest.mark.parametrize("name", ("SiT-XL/3", "SiT-H/2", "DiT-XL/3", ""))
def test_an_unknown_size_is_named_with_the_known_ones(name):
    refused(lambda: size(name), repr(name), "SiT-XL/2")
