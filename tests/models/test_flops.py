import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from repa_fast.models.flops import projector_flops, sit_flops, transformer_flops, vit_flops
from repa_fast.models.sit import SiT

XL = {"tokens": 256, "width": 1152, "depth": 28}
PROJECTOR = {"tokens": 256, "width": 1152, "projector_dim": 2048, "z_dim": 768}
DINOV2_B = {"patches": 256, "prefix": 1, "width": 768, "depth": 12, "patch_size": 14}


def test_xl_costs_what_the_floor_says():
    whole = transformer_flops(**XL)
    mlp = whole - transformer_flops(**XL, mlp_ratio=0)
    # Attention alone grows with the square of the tokens.
    attention = (transformer_flops(**XL | {"tokens": 512}) - 2 * whole) / 2
    linear = whole - mlp - attention  # qkv and proj, as 6 to 2
    projector = projector_flops(**PROJECTOR)
    parts = (0.75 * linear, attention, 0.25 * linear, mlp, projector)
    assert [round(part / 1e9, 2) for part in parts] == [57.08, 8.46, 19.03, 152.20, 4.16]
    model = sit_flops(**XL, mlp_ratio=4.0, patch_values=16)
    # Modulation, patches and time have two figures of two decimals.
    assert (model - whole) / 1e9 == pytest.approx(0.45 + 0.02, abs=0.01)
    assert model / 1e9 == pytest.approx(57.08 + 8.46 + 19.03 + 152.20 + 0.45 + 0.02, abs=0.03)
    encoder = vit_flops(**DINOV2_B)
    assert round(encoder / 1e9, 1) == 46.3
    assert round((3 * (model + projector) + encoder) / 1e9, 1) == 770.5


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
