"""Estimates of a run's size and cost, and the micro-batch that fits."""

from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

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
from repa_fast.train.state import TrainState
from tests.train.conftest import tiny_state


def large(**changes) -> memory.Budget:
    config = replace(presets.get("sit-b2-repa"), data_dir="/nowhere", **changes)
    return budget(config, expected_metadata(config))


def test_the_model_and_a_projector_of_each_encoder_are_counted():
    """Of SiT-B/2 there are 130,500,112 parameters without and 137,845,008 with one for DINOv2-B."""
    found, bare = large(), large(enc_type="none")
    assert (found.parameters, found.parameters_with_projectors) == (130_500_112, 137_845_008)
    assert bare.parameters == bare.parameters_with_projectors == found.parameters
    assert bare.encoder_flops == 0
    two = large(enc_type="dinov2-vit-b,dinov2-vit-l", encoder_depth=4)
    heads = sum(2048 * (768 + 1) + 2048 * (2048 + 1) + out * (2048 + 1) for out in (768, 1024))
    assert two.parameters_with_projectors - two.parameters == heads
    # weights, gradients, two moments and the average, in fp32
    assert two.state_bytes == 5 * 4 * two.parameters_with_projectors


def test_activations_grow_with_tokens_width_and_depth():
    def activations(**changes):
        return budget(replace(presets.get("digits"), **changes), digits_metadata()).activation_bytes

    assert activations(depth=12) == activations(hidden_size=256) == 2 * activations()
    assert activations(patch_size=2, enc_type="none") == 4 * activations()


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


def tiny(**changes) -> TrainState:
    return tiny_state(**{"depth": 2, "enc_type": "none", "batch_size": 48} | changes)


def set_memory(monkeypatch, number_of_bytes: float) -> None:
    sizes = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": int(number_of_bytes)}
    monkeypatch.setattr(memory, "os", SimpleNamespace(sysconf=sizes.get))


def needed(config: TrainConfig, images: int) -> float:
    """Bytes of machine memory in which `images` just fit: twice their fp32 activations, which are
    twice those in half precision."""
    return 2 * images * 2 * budget(config, digits_metadata()).activation_bytes


def test_an_explicit_micro_batch_is_taken_up_to_the_local_batch(monkeypatch):
    """However little memory there is."""
    set_memory(monkeypatch, 1)
    for asked, chosen in ((1, 1), (7, 7), (48, 48), (500, 48)):
        assert choose_micro_batch(tiny(micro_batch=asked)) == chosen


@pytest.mark.parametrize("precision", ["auto", "no"])  # which are one on a CPU
def test_the_batch_is_halved_until_it_fits(monkeypatch, precision):
    state = tiny(mixed_precision=precision)
    for room, chosen in ((48, 48), (47, 24), (24, 24), (23, 12), (5, 3), (1, 1), (0.1, 1)):
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


def test_what_was_compiled_for_a_size_that_did_not_fit_is_dropped(monkeypatch):
    for room, compiled, resets in ((48, True, 0), (24, True, 1), (5, True, 1), (5, False, 0)):
        reset = mock.Mock()
        monkeypatch.setattr(torch._dynamo, "reset", reset)
        state = tiny(compile=compiled)
        set_memory(monkeypatch, needed(state.config, room) + 1)
        choose_micro_batch(state)
        assert reset.call_count == resets


def test_sums_of_several_micro_batches_have_room_before_a_size_is_tried():
    state = tiny_state(mixed_precision="bf16")
    trained = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    assert state.gradients.room(passes=1) is None
    assert state.gradients.room(passes=2).nbytes == 4 * trained
