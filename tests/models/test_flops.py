import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from repa_fast.models.flops import projector_flops, sit_flops, transformer_flops, vit_flops
from repa_fast.models.sit import SiT

XL = {"tokens": 256, "width": 1152, "depth": 28}
PROJECTOR = {"tokens": 256, "width": 1152, "projector_dim": 2048, "z_dim": 768}
DINOV2_B = {"patches": 256, "prefix": 1, "width": 768, "depth": 12, "patch_size": 14}


def giga(flops):
    return round(flops / 1e9, 2)


def test_parts_of_xl_are_those_of_the_floor():
    whole = transformer_flops(**XL)
    mlp = whole - transformer_flops(**XL, mlp_ratio=0)
    # Attention alone grows with the square of the tokens.
    attention = (transformer_flops(**XL | {"tokens": 512}) - 2 * whole) / 2
    linear = whole - mlp - attention  # qkv and proj, as 6 to 2
    assert [giga(p) for p in (0.75 * linear, attention, 0.25 * linear, mlp)] == [
        57.08,
        8.46,
        19.03,
        152.20,
    ]


def test_modulation_patches_and_time_of_xl_are_those_of_the_floor():
    model = sit_flops(**XL, mlp_ratio=4.0, patch_values=16)
    rest = model - transformer_flops(**XL)
    assert rest / 1e9 == pytest.approx(0.45 + 0.02, abs=0.01)  # two figures of two decimals
    parts = (57.08, 8.46, 19.03, 152.20, 0.45, 0.02)
    assert model / 1e9 == pytest.approx(sum(parts), abs=0.005 * len(parts))


def test_projector_of_xl_is_that_of_the_floor():
    assert giga(projector_flops(**PROJECTOR)) == 4.16


def test_training_xl_with_dinov2_b_costs_770_5_gflop_an_image():
    model = sit_flops(**XL, mlp_ratio=4.0, patch_values=16) + projector_flops(**PROJECTOR)
    encoder = vit_flops(**DINOV2_B)
    assert round(encoder / 1e9, 1) == 46.3
    assert round((3 * model + encoder) / 1e9, 1) == 770.5


@pytest.mark.parametrize("patch, depth, mlp_ratio", ((2, 3, 4.0), (4, 1, 2.0)))
def test_sit_flops_are_those_that_torch_counts(patch, depth, mlp_ratio):
    model = SiT(
        input_size=16,
        patch_size=patch,
        hidden_size=96,
        depth=depth,
        num_heads=4,
        mlp_ratio=mlp_ratio,
        encoder_depth=1,
        z_dims=(40,),
        projector_dim=80,
        fused_attn=False,
    )
    tokens, images = (16 // patch) ** 2, 2
    args = torch.zeros(images, 4, 16, 16), torch.zeros(images), torch.zeros(images).long()
    with FlopCounterMode(display=False) as counter:
        model.eval()(*args)
    sizes = {"tokens": tokens, "width": 96}
    expected = sit_flops(**sizes, depth=depth, mlp_ratio=mlp_ratio, patch_values=patch**2 * 4)
    assert counter.get_total_flops() == pytest.approx(images * expected, rel=0.01)
    with FlopCounterMode(display=False) as projectors:
        model(*args, project=True)
    extra = projectors.get_total_flops() - counter.get_total_flops()
    assert extra == pytest.approx(
        images * projector_flops(**sizes, projector_dim=80, z_dim=40), rel=0.01
    )
