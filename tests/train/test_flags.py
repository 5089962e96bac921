"""What flags do: upstream's here, and those that choose implementations."""

import pytest
import torch

from repa_fast import ops
from repa_fast.backend import dispatch
from repa_fast.kernels.attention import current_backend
from repa_fast.train.step import draw_local, synthetic_batch, train_step
from tests.refusals import refused


@pytest.fixture(autouse=True)
def defaults(monkeypatch):
    """What is set for the process is as it was after each test."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    dispatch.use_kernels(None)
    ops.set_attention_backend("sdpa")


def drawn(make_state, **flags):
    return draw_local(make_state(batch_size=2000, **flags))


def test_adam_flags_reach_the_optimizer(make_state):
    betas = {"adam_beta1": 0.8, "adam_beta2": 0.95}
    state = make_state(learning_rate=3e-4, adam_weight_decay=0.1, adam_epsilon=1e-6, **betas)
    group = state.optimizer.param_groups[0]
    assert group["lr"] == 3e-4 and group["betas"] == (0.8, 0.95)
    assert group["weight_decay"] == 0.1 and group["eps"] == 1e-6


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
    "flags, probability",
    [({"cfg_prob": 0.0}, 0.0), ({"cfg_prob": 0.3}, 0.3), ({"cfg_prob": 0.3, "legacy": True}, 0.51)],
)
def test_cfg_prob_is_honoured(make_state, flags, probability):
    share = drawn(make_state, **flags).drop.float().mean().item()
    assert share == pytest.approx(probability, abs=4 * (0.25 / 2000) ** 0.5 if probability else 0)


def test_weighting_and_path_shape_the_times(make_state):
    uniform = drawn(make_state, weighting="uniform", path_type="linear").t
    linear, cosine = (
        drawn(make_state, weighting="lognormal", path_type=path).t for path in ("linear", "cosine")
    )
    ratio = linear / (1 - linear)
    assert torch.allclose((torch.pi / 2 * cosine).tan(), ratio, rtol=1e-4)
    assert uniform.std() == pytest.approx(12**-0.5, abs=0.01)
    assert ratio.log().std() == pytest.approx(1, abs=0.06)


def test_path_type_changes_the_loss(make_state):
    losses = set()
    for path in ("linear", "cosine"):
        state = make_state(path_type=path)
        batch, _ = synthetic_batch(state, 12)
        batch["moments"].fill_(0.5)
        train_step(state, batch)
        losses.add(state.metrics.read(state.world)["denoise"])
    assert len(losses) == 2


def test_seed_changes_weights_and_draws(make_state):
    a, b, c = make_state(seed=0), make_state(seed=1), make_state(seed=0)
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(a.model.state_dict()[name], c.model.state_dict()[name])
    assert not torch.equal(a.model.state_dict()[name], b.model.state_dict()[name])
    assert not torch.equal(draw_local(a).noise, draw_local(b).noise)


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


def test_a_run_says_which_kernels_it_uses_and_why(make_state):
    kernels, attention, optimizer = make_state().notes
    assert kernels == "kernels: reference, since the tensors are on the CPU"
    assert attention.startswith("attention: sdpa (auto: ")
    assert optimizer == "optimizer: torch, since the tensors are on cpu"


def test_what_is_asked_for_is_set_for_the_process(make_state):
    kernels, attention, _ = make_state(kernels="reference", attention="math").notes
    assert kernels == "kernels: reference, asked for"
    assert attention.startswith("attention: math (asked for")
    assert dispatch.asked() == "reference" and current_backend() == "math"


def test_auto_leaves_the_choice_to_the_environment(make_state, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert make_state().notes[0] == "kernels: reference, asked for"


def test_the_explicit_softmax_leaves_the_backend_alone(make_state):
    state = make_state(fused_attn=False, attention="math")
    assert len(state.notes) == 2 and current_backend() == "sdpa"


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"patch_size": 2}, "digits-vit gives 16 tokens, expected 64"),
        ({"compute_copy": "optimizer", "mixed_precision": "no"}, "compute_copy is 'optimizer'"),
        ({"compute_copy": "optimizer", "mixed_precision": "fp16"}, "compute_copy is 'optimizer'"),
        ({"compute_copy": "optimizer", "mixed_precision": "auto"}, "compute_copy is 'optimizer'"),
        ({"joint_adaln": True}, "joint_adaln is set, which needs --compute-copy"),
        ({"residual_dtype": "bf16"}, "residual_dtype is 'bf16', which needs --mixed-precision"),
        (
            {"residual_dtype": "bf16", "mixed_precision": "fp16"},
            "with mixed_precision 'fp16', expected bf16",
        ),
        ({"kernels": "triton"}, "'triton', but the tensors are on the CPU"),
        ({"attention": "fa9"}, "'fa9', expected one of auto, sdpa"),
    ],
)
def test_what_cannot_be_had_is_refused_at_the_start(make_state, flags, words):
    refused(lambda: make_state(**flags), words)
