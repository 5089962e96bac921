"""Tiny states to measure, and a process that is afterwards as it was before."""

import dataclasses

import pytest
import torch

from repa_fast import ops
from repa_fast.backend import dispatch
from repa_fast.configs import presets
from repa_fast.data.digits import digits_metadata
from repa_fast.distributed import World
from repa_fast.train.state import build_state

TINY = {"hidden_size": 32, "depth": 3, "num_heads": 2, "encoder_depth": 2, "projector_dim": 32}


@pytest.fixture(autouse=True)
def same_process():
    """Samplers choose the precision of matrix products, gates the kernels, readers the threads, for
    all that follows."""
    threads = torch.get_num_threads()
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn
    dispatch.use_kernels(None)
    ops.set_attention_backend("sdpa")


@pytest.fixture
def coarse_pictures(monkeypatch):
    """Pictures of few pixels and without a layout, which take half the time."""
    from matplotlib.figure import Figure

    def save(figure, path, **_):
        figure.set_layout_engine("none")
        saved(figure, path, dpi=10)

    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", save)


@pytest.fixture
def tiny_digits(monkeypatch):
    """The preset "digits" with a smaller model."""
    preset = presets.PRESETS["digits"]
    smaller = dataclasses.replace(preset, settings={**preset.settings, **TINY})
    monkeypatch.setitem(presets.PRESETS, "digits", smaller)


@pytest.fixture
def make_state(tiny_digits):
    """make_state(**changes) -> state of 6 digits whose weights are nowhere zero, as most gradients
    would be."""

    def make(**changes):
        changes = {"batch_size": 6, "report_to": "none", **changes}
        config = dataclasses.replace(presets.get("digits"), **changes)
        state = build_state(config, digits_metadata(), World(0, 1, torch.device("cpu")))
        state.micro_batch = state.local_batch
        generator = torch.Generator().manual_seed(1)
        weights = state.model.state_dict()
        for weight in weights.values():
            if not weight.any():
                weight.normal_(std=0.1, generator=generator)
        state.model.load_state_dict(weights)
        state.ema.load_state_dict(state.model.state_dict())
        return state

    return make
