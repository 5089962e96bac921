"""The teacher that SRA's released code has, which ours is compared with."""

import dataclasses

import torch

from benchmarks.step.sra import whole_teacher
from repa_fast import ops
from repa_fast.configs import presets
from repa_fast.data.digits import digits_metadata
from repa_fast.distributed import World
from repa_fast.testing import randomise
from repa_fast.train.state import build_state
from repa_fast.train.step import synthetic_batch

TINY = {"hidden_size": 32, "depth": 3, "num_heads": 2, "batch_size": 6, "report_to": "none"}


def test_it_hears_what_ours_does_whatever_backend_the_run_has():
    """On a GPU a run's backend is one for bf16; sdpa-cudnn takes nothing on a CPU."""
    config = dataclasses.replace(
        presets.get("digits"), **TINY, align="sra", enc_type=None, block_out_s=1, block_out_t=2
    )
    state = build_state(config, digits_metadata(), World(0, 1, torch.device("cpu")))
    randomise(state.ema)
    batch, draws = synthetic_batch(state, 6)
    clean = draws.posterior_noise
    with torch.no_grad():
        expected = state.alignment.targets(batch, clean, draws, state.objective, state.ema)
        ops.set_attention_backend("sdpa-cudnn")
        try:
            found = whole_teacher(state.alignment, batch, clean, draws, state.objective, state.ema)
        finally:
            ops.set_attention_backend("sdpa")
    assert len(found) == len(expected) == 1
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
