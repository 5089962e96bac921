"""What makes comparisons honest: the rivals compute the same losses, gradients and targets."""

import sys

import pytest
import torch

from benchmarks.step import baseline
from benchmarks.step.baseline import Baseline
from benchmarks.step.sra import whole_teacher
from repa_fast import ops
from repa_fast.train.step import losses, synthetic_batch, train_step
from tests.refusals import refused

BATCH = 6
either_recipe = pytest.mark.parametrize("tuned", [False, True])


def rival_of(state, tuned=True):
    return Baseline(state, tuned=tuned, compiled=False)


@either_recipe
def test_loss_and_gradients_are_those_of_the_project(make_state, tuned):
    """In fp64, but for the features, which are computed in fp32."""
    state = make_state()
    batch, draws = synthetic_batch(state, BATCH)
    draws.drop[:2] = torch.tensor([True, False])
    ((name, encoder),) = state.alignment.encoders.items()
    features = encoder(batch["image"]).double()
    state.alignment.encoders = {name: lambda image: features}
    batch = {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}
    draws = type(draws)(*(t.double() if t.is_floating_point() else t for t in draws))
    rival = rival_of(state, tuned)
    state.model.double()
    rival.model.double().load_state_dict(state.model.state_dict())
    denoise, (aligned,) = losses(state, state.model, batch, draws)
    loss = denoise.mean() + state.config.proj_coeff * aligned.mean()
    denoise, aligned = rival.losses(batch, draws)
    found = denoise + state.config.proj_coeff * aligned
    loss.backward()
    found.backward()
    gradients, theirs = (
        {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        for model in (state.model, rival.model)
    )
    # a loss rounds a few times; a gradient passes some tens of operations
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(loss.item(), rel=1e-12)
    assert list(theirs) == list(gradients)
    for name, gradient in gradients.items():
        assert gradient.norm() > 0, name
        assert (theirs[name] - gradient).norm() <= 1e-12 * gradient.norm(), name


@either_recipe
def test_a_step_is_the_projects_step(make_state, tuned, monkeypatch):
    """Weights and averages after three steps with the project's draws."""
    state = make_state()
    batch, draws = synthetic_batch(state, BATCH)
    rival = rival_of(state, tuned)
    before = [p.detach().clone() for p in rival.model.parameters()]
    monkeypatch.setattr(rival, "draw", lambda size: draws)
    monkeypatch.setattr("repa_fast.train.step.draw_local", lambda state: draws)
    for _ in range(3):
        rival.step(batch)
        train_step(state, batch)
    rival.check()
    for theirs, ours in ((rival.model, state.model), (rival.ema, state.ema)):
        pairs = zip(theirs.parameters(), ours.parameters(), before)
        for number, (p, own, first) in enumerate(pairs):
            moved = (own - first).norm()
            # AdamW divides by the gradient's size: where it is about its rounding, so is the step
            assert (p - own).norm() <= 0.02 * moved + 1e-7, number


def test_the_two_alignment_losses_are_one():
    torch.manual_seed(0)
    pairs = [[torch.randn(4, 9, width, dtype=torch.float64) for width in (5, 7)] for _ in range(2)]
    one_by_one = baseline.sample_by_sample(*pairs)
    torch.testing.assert_close(one_by_one, baseline.at_once(*pairs), rtol=1e-13, atol=0)
    assert baseline.at_once([pairs[0][0]], [3 * pairs[0][0]]).item() == pytest.approx(-1)


@pytest.mark.parametrize("tuned, expected", [(False, 3), (True, 0)])
def test_only_the_released_recipe_reads_numbers(make_state, monkeypatch, tuned, expected):
    """torch's own foreach AdamW reads its step counts, which it keeps on the host."""
    reads = []
    item = torch.Tensor.item

    def counted(tensor):
        if sys._getframe(1).f_code.co_filename == baseline.__file__:
            reads.append(tensor)
        return item(tensor)

    monkeypatch.setattr(torch.Tensor, "item", counted)
    state = make_state()
    batch, _ = synthetic_batch(state, BATCH)
    rival = rival_of(state, tuned)
    reads.clear()
    rival.step(batch)
    assert len(reads) == expected


@pytest.mark.parametrize(
    "changes", [{"loss_type": "nt-xent"}, {"prediction": "noise"}, {"qk_norm": True}]
)
def test_what_the_recipe_does_not_do_is_refused(make_state, changes):
    state = make_state(**changes)
    refused(lambda: rival_of(state, tuned=False), f"^{next(iter(changes))} is .*, expected")


def test_every_block_of_the_rival_gets_a_contiguous_residual_and_a_loss_of_nan_is_told(make_state):
    """As in the project's model; compiled, another layout of the first is a graph more."""
    state, seen = make_state(), []
    rival = rival_of(state)
    for block in rival.model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    rival.losses(*synthetic_batch(state, BATCH))
    assert seen == [True] * state.config.depth
    rival.loss = torch.tensor(float("nan"))
    refused(rival.check, "last loss is nan", error=RuntimeError)


def test_the_teacher_of_sras_release_hears_what_ours_does_whatever_backend_the_run_has(make_state):
    """On a GPU a run's backend is one for bf16; sdpa-cudnn takes nothing on a CPU."""
    state = make_state(align="sra", enc_type=None, block_out_s=1, block_out_t=2)
    batch, draws = synthetic_batch(state, BATCH)
    clean = draws.posterior_noise
    with torch.no_grad():
        expected = state.alignment.targets(batch, clean, draws, state.objective, state.ema)
        ops.set_attention_backend("sdpa-cudnn")
        found = whole_teacher(state.alignment, batch, clean, draws, state.objective, state.ema)
    assert len(found) == len(expected) == 1
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
