"""What flags do: upstream's here, and those that choose implementations."""

import pytest
import torch

from repa_fast import ops
from repa_fast.backend import dispatch
from repa_fast.diffusion.draws import draw
from repa_fast.diffusion.path import cosine, linear
from repa_fast.kernels.attention import current_backend
from repa_fast.train.step import draw_local, losses, synthetic_batch, train_step
from tests.refusals import refused
from tests.train.conftest import assert_same


@pytest.fixture(autouse=True)
def defaults(monkeypatch):
    """What is set for the process is as it was after each test."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    dispatch.use_kernels(None)
    ops.set_attention_backend("sdpa")


def test_adam_flags_reach_the_optimizer(make_state):
    flags = {"adam_weight_decay": 0.1, "adam_epsilon": 1e-6, "adam_beta1": 0.8, "adam_beta2": 0.95}
    group = make_state(learning_rate=3e-4, **flags).optimizer.param_groups[0]
    found = [group[name] for name in ("lr", "betas", "weight_decay", "eps")]
    assert found == [3e-4, (0.8, 0.95), 0.1, 1e-6]


def test_max_grad_norm_clips(make_state):
    """Adam is blind to the scale of gradients; what it saw is in its first moment."""
    norms = {}
    for limit in (1e-3, 1e3):
        state = make_state(max_grad_norm=limit)
        train_step(state, synthetic_batch(state, 12)[0])
        moments = [v["exp_avg"].flatten() for v in state.optimizer.state.values()]
        norms[limit] = torch.cat(moments).norm().item() / 0.1  # 1 - beta1
        logged = state.metrics.read(state.world)["grad_norm"]
        assert logged > 0.01
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)
    assert norms[1e3] == pytest.approx(logged, rel=1e-3)


@pytest.mark.parametrize(
    "flags, options",
    [
        ({"seed": 3}, {"drop_prob": 0.1}),
        ({"cfg_prob": 0.3}, {"drop_prob": 0.3}),
        ({"cfg_prob": 0.3, "legacy": True}, {"drop_prob": 0.51}),
        ({"cfg_prob": 0.0, "weighting": "lognormal"}, {"weighting": "lognormal"}),
        ({"cfg_prob": 0.0, "path_type": "cosine", "weighting": "lognormal"},
         {"path": cosine, "weighting": "lognormal"}),
    ],
)  # fmt: skip
def test_flags_of_the_draws_are_honoured(make_state, flags, options):
    state = make_state(batch_size=200, **flags)
    expected = draw(flags.get("seed", 0), 0, 200, (3, 16, 16), **{"path": linear} | options)
    assert_same(draw_local(state), expected)


def test_a_velocity_is_learnt_along_the_path_of_the_flag(make_state):
    state = make_state(path_type="cosine", enc_type="none")
    batch, draws = synthetic_batch(state, 6)
    clean, batch["moments"][:, 3:] = batch["moments"][:, :3], 0
    noisy, velocity = cosine.interpolate(clean, draws.noise, draws.t)
    output, _ = state.model(noisy, draws.t, batch["label"], draws.drop)
    denoise, _ = losses(state, state.model, batch, draws)
    assert torch.allclose(denoise, (output - velocity).square().mean((1, 2, 3)), rtol=1e-5)


def test_the_seed_decides_the_weights(make_state):
    states = (make_state(seed=seed) for seed in (0, 1, 0))
    first, other, again = (s.model.state_dict()["blocks.0.attn.qkv.weight"] for s in states)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_model_flags_reach_the_model(make_state):
    state = make_state(fused_attn=False, qk_norm=True, encoder_depth=1, num_classes=11)
    assert not state.model.blocks[0].attn.fused_attn
    assert "blocks.0.attn.q_norm.weight" in state.model.state_dict()
    assert state.model.encoder_depth == 1
    assert len(state.model.y_embedder.embedding_table.weight) == 12


def test_allow_tf32(make_state):
    for allowed, precision in ((True, "high"), (False, "highest")):
        make_state(allow_tf32=allowed)
        assert torch.get_float32_matmul_precision() == precision


def test_a_run_says_which_kernels_it_uses_and_why(make_state, monkeypatch):
    kernels, attention, optimizer = make_state().notes
    assert kernels == "kernels: reference, since the tensors are on the CPU"
    assert attention.startswith("attention: sdpa (auto: ")
    assert optimizer == "optimizer: torch, since the tensors are on cpu"
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert make_state().notes[0] == "kernels: reference, asked for"


def test_what_is_asked_for_is_set_for_the_process(make_state):
    kernels, attention, _ = make_state(kernels="reference", attention="math").notes
    assert kernels == "kernels: reference, asked for"
    assert attention.startswith("attention: math (asked for")
    assert dispatch.asked() == "reference" and current_backend() == "math"


def test_the_explicit_softmax_leaves_the_backend_alone(make_state):
    state = make_state(fused_attn=False, attention="math")
    assert len(state.notes) == 2 and current_backend() == "sdpa"


BF16 = {"residual_dtype": "bf16"}


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"patch_size": 2}, "digits-vit gives 16 tokens, expected 64"),
        (BF16, "residual_dtype is 'bf16', which needs --mixed-precision"),
        (BF16 | {"mixed_precision": "fp16"}, "with mixed_precision 'fp16', expected bf16"),
        ({"kernels": "triton"}, "'triton', but the tensors are on the CPU"),
        ({"attention": "fa9"}, "'fa9', expected one of auto, sdpa"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_at_the_start(make_state, flags, words):
    refused(lambda: make_state(**flags), words)
