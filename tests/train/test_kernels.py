import pytest
import torch

from repa_fast import ops
from repa_fast.backend import dispatch
from repa_fast.kernels.attention import current_backend


@pytest.fixture(autouse=True)
def defaults(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    yield
    dispatch.use_kernels(None)
    ops.set_attention_backend("sdpa")


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


def test_kernels_that_cannot_run_are_refused_at_the_start(make_state):
    with pytest.raises(ValueError, match="'triton', but the tensors are on the CPU"):
        make_state(kernels="triton")


def test_an_unknown_attention_backend_is_refused_at_the_start(make_state):
    with pytest.raises(ValueError, match="'fa9', expected one of auto, sdpa"):
        make_state(attention="fa9")


def test_the_explicit_softmax_leaves_the_backend_alone(make_state):
    state = make_state(fused_attn=False, attention="math")
    assert len(state.notes) == 2 and current_backend() == "sdpa"
    x = torch.randn(2, 16, 32)
    fused = make_state(seed=0).model.blocks[0].attn
    fused.load_state_dict(state.model.blocks[0].attn.state_dict())
    torch.testing.assert_close(state.model.blocks[0].attn(x), fused(x), rtol=1e-5, atol=1e-6)
