"""Estimates of a run's size and cost, and the micro-batch that fits."""

import os
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from repa_fast import encoders
from repa_fast.configs import presets
from repa_fast.configs.build import build_model, expected_metadata
from repa_fast.configs.config import TrainConfig
from repa_fast.data.digits import digits_metadata
from repa_fast.distributed import World
from repa_fast.train import memory
from repa_fast.train.memory import budget, choose_micro_batch
from repa_fast.train.state import TrainState, build_state

PUBLISHED = {  # depth, width, official parameters without and with one 768-d projector
    "S": (12, 384, 32_957_200, 39_515_664),
    "B": (12, 768, 130_500_112, 137_845_008),
    "L": (24, 1024, 458_086_416, 465_955_600),
    "XL": (28, 1152, 675_111_184, 683_242_512),
}


def large(name: str) -> tuple[TrainConfig, memory.Budget]:
    config = replace(presets.get(name), data_dir="/nowhere")
    return config, budget(config, expected_metadata(config))


def model_parameters(width: int, depth: int, tokens: int, patch_values: int, classes: int) -> int:
    block = 12 * width**2 + 9 * width + 6 * width * (width + 1)  # attention, MLP, adaLN
    embed = width * (patch_values + 1) + 256 * width + width**2 + 2 * width
    final = patch_values * (width + 1) + 2 * width * (width + 1)
    return tokens * width + embed + (classes + 1) * width + depth * block + final


def projector_parameters(width: int, hidden: int, out: int) -> int:
    return hidden * (width + 1) + hidden * (hidden + 1) + out * (hidden + 1)


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameters_are_those_of_the_official_models(size):
    depth, width, without, with_projector = PUBLISHED[size]
    _, estimate = large(f"sit-{size.lower()}2-repa")
    assert estimate.parameters == without == model_parameters(width, depth, 256, 16, 1000)
    assert estimate.parameters_with_projectors == with_projector
    assert with_projector - without == projector_parameters(width, 2048, 768)


def test_parameters_without_alignment_have_no_projector():
    _, estimate = large("sit-b2")
    assert estimate.parameters == estimate.parameters_with_projectors == PUBLISHED["B"][2]
    assert estimate.encoder_flops == 0


def test_every_encoder_has_its_projector():
    config = replace(presets.get("sit-b2"), data_dir="/nowhere")
    config = replace(config, enc_type="dinov2-vit-b,dinov2-vit-l", encoder_depth=4)
    estimate = budget(config, expected_metadata(config))
    heads = projector_parameters(768, 2048, 768) + projector_parameters(768, 2048, 1024)
    assert estimate.parameters_with_projectors - estimate.parameters == heads


def test_state_is_weights_gradients_two_moments_and_the_average_in_fp32():
    _, estimate = large("sit-b2-repa")
    assert estimate.state_bytes == 5 * 4 * estimate.parameters_with_projectors


def test_activations_grow_with_tokens_width_and_depth():
    config = presets.get("digits")
    metadata = digits_metadata()
    base = budget(config, metadata).activation_bytes
    assert budget(replace(config, depth=12), metadata).activation_bytes == 2 * base
    assert budget(replace(config, hidden_size=256), metadata).activation_bytes == 2 * base
    smaller = replace(config, patch_size=2, enc_type="none")
    assert budget(smaller, metadata).activation_bytes == 4 * base


def test_flops_are_those_of_the_matrix_products_that_run():
    config = replace(presets.get("digits"), fused_attn=False)
    model, encoder = build_model(config, digits_metadata()), encoders.load("digits-vit", 16, "cpu")
    with FlopCounterMode(display=False) as forward:
        model(torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1).long(), project=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as frozen:
        encoder(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    estimate = budget(config, digits_metadata())
    assert estimate.encoder_flops == frozen.get_total_flops()
    expected = 3 * forward.get_total_flops() + frozen.get_total_flops()
    assert estimate.train_flops == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "name, peak", [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-40GB", 312e12)]
)
def test_known_devices_have_a_peak(name, peak):
    assert memory.peak_flops(name) == peak


def test_an_unknown_device_has_no_peak():
    assert memory.peak_flops("x86_64") is None


def tiny(world: World | None = None, **changes) -> TrainState:
    changes = {"hidden_size": 32, "depth": 2, "enc_type": "none", "batch_size": 48} | changes
    config = replace(presets.get("digits"), **changes)
    state = build_state(config, digits_metadata(), World(0, 1, torch.device("cpu")))
    return replace(state, world=world) if world else state


def set_memory(monkeypatch, number_of_bytes: float) -> None:
    sizes = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": int(number_of_bytes)}
    monkeypatch.setattr(os, "sysconf", lambda name: sizes[name])


def needed(config: TrainConfig, images: int) -> float:
    """Bytes of machine memory in which `images` just fit: twice their fp32 activations, which are
    twice those in half precision."""
    return 2 * images * 2 * budget(config, digits_metadata()).activation_bytes


@pytest.mark.parametrize("asked, chosen", [(1, 1), (7, 7), (48, 48), (500, 48)])
def test_an_explicit_micro_batch_is_taken_up_to_the_local_batch(asked, chosen):
    assert choose_micro_batch(tiny(micro_batch=asked)) == chosen


def test_an_explicit_micro_batch_does_not_look_at_the_memory(monkeypatch):
    state = tiny(micro_batch=48)
    set_memory(monkeypatch, 1)
    assert choose_micro_batch(state) == 48


def test_the_whole_local_batch_fits_into_enough_memory(monkeypatch):
    state = tiny()
    set_memory(monkeypatch, needed(state.config, 48) + 1)
    assert choose_micro_batch(state) == 48


@pytest.mark.parametrize("room, chosen", [(47, 24), (24, 24), (23, 12), (5, 3), (1, 1), (0.1, 1)])
def test_the_batch_is_halved_until_it_fits(monkeypatch, room, chosen):
    state = tiny()
    set_memory(monkeypatch, needed(state.config, room) + 1)
    assert choose_micro_batch(state) == chosen


def test_auto_and_fp32_choose_the_same_on_a_cpu(monkeypatch):
    """auto is fp32 there, so both save the same activations."""
    chosen = {}
    for precision in ("auto", "no"):
        state = tiny(mixed_precision=precision)
        set_memory(monkeypatch, needed(state.config, 48) + 1)
        chosen[precision] = choose_micro_batch(state)
    assert chosen == {"auto": 48, "no": 48}


def test_all_processes_choose_what_fits_on_the_smallest(monkeypatch):
    class Crowded(World):
        def any(self, flag: bool) -> bool:
            asked.append(flag)
            return len(asked) <= 2

    asked = []
    state = tiny(Crowded(0, 1, torch.device("cpu")))
    set_memory(monkeypatch, needed(state.config, 48) + 1)
    assert choose_micro_batch(state) == 12
    assert asked == [False, False, False]


@pytest.mark.parametrize(
    "room, compiled, resets", [(48, True, 0), (24, True, 1), (5, True, 1), (5, False, 0)]
)
def test_what_was_compiled_for_a_size_that_did_not_fit_is_dropped(
    monkeypatch, room, compiled, resets
):
    seen = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: seen.append(True))
    state = tiny(compile=compiled)
    set_memory(monkeypatch, needed(state.config, room) + 1)
    choose_micro_batch(state)
    assert len(seen) == resets
