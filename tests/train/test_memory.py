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
from tests.train.conftest import ALONE

PUBLISHED = {  # official parameters without and with one 768-d projector
    "S": (32_957_200, 39_515_664),
    "B": (130_500_112, 137_845_008),
    "L": (458_086_416, 465_955_600),
    "XL": (675_111_184, 683_242_512),
}


def large(name: str) -> tuple[TrainConfig, memory.Budget]:
    config = replace(presets.get(name), data_dir="/nowhere")
    return config, budget(config, expected_metadata(config))


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameters_are_those_of_the_official_models(size):
    _, estimate = large(f"sit-{size.lower()}2-repa")
    assert (estimate.parameters, estimate.parameters_with_projectors) == PUBLISHED[size]


def test_without_alignment_there_is_no_projector_and_every_encoder_has_its_own():
    config, estimate = large("sit-b2")
    assert estimate.parameters == estimate.parameters_with_projectors == PUBLISHED["B"][0]
    assert estimate.encoder_flops == 0
    config = replace(config, enc_type="dinov2-vit-b,dinov2-vit-l", encoder_depth=4)
    estimate = budget(config, expected_metadata(config))
    heads = sum(2048 * (768 + 1) + 2048 * (2048 + 1) + out * (2048 + 1) for out in (768, 1024))
    assert estimate.parameters_with_projectors - estimate.parameters == heads
    # weights, gradients, two moments and the average, in fp32
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
    "name, peak",
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-40GB", 312e12), ("x86_64", None)],
)
def test_known_devices_have_a_peak(name, peak):
    assert memory.peak_flops(name) == peak


def tiny(**changes) -> TrainState:
    changes = {"hidden_size": 32, "depth": 2, "enc_type": "none", "batch_size": 48} | changes
    config = replace(presets.get("digits"), **changes)
    return build_state(config, digits_metadata(), ALONE)


def set_memory(monkeypatch, number_of_bytes: float) -> None:
    sizes = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": int(number_of_bytes)}
    monkeypatch.setattr(os, "sysconf", lambda name: sizes[name])


def needed(config: TrainConfig, images: int) -> float:
    """Bytes of machine memory in which `images` just fit: twice their fp32 activations, which are
    twice those in half precision."""
    return 2 * images * 2 * budget(config, digits_metadata()).activation_bytes


@pytest.mark.parametrize("asked, chosen", [(1, 1), (7, 7), (48, 48), (500, 48)])
def test_an_explicit_micro_batch_is_taken_up_to_the_local_batch(monkeypatch, asked, chosen):
    """However little memory there is."""
    state = tiny(micro_batch=asked)
    set_memory(monkeypatch, 1)
    assert choose_micro_batch(state) == chosen


@pytest.mark.parametrize("precision", ["auto", "no"])  # which are one on a CPU
@pytest.mark.parametrize(
    "room, chosen", [(48, 48), (47, 24), (24, 24), (23, 12), (5, 3), (1, 1), (0.1, 1)]
)
def test_the_batch_is_halved_until_it_fits(monkeypatch, room, chosen, precision):
    state = tiny(mixed_precision=precision)
    set_memory(monkeypatch, needed(state.config, room) + 1)
    assert choose_micro_batch(state) == chosen


def test_all_processes_choose_what_fits_on_the_smallest(monkeypatch):
    class Crowded(World):
        def any(self, flag: bool) -> bool:
            asked.append(flag)
            return len(asked) <= 2

    asked = []
    state = replace(tiny(), world=Crowded(0, 1, torch.device("cpu")))
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
