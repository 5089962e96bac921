"""What makes the ladder honest: the rival computes the same loss and gradients."""

import dataclasses
import sys

import pytest
import torch

from benchmarks.step import baseline
from benchmarks.step.baseline import Baseline
from repa_fast.configs import presets
from repa_fast.data.digits import digits_metadata
from repa_fast.distributed import World
from repa_fast.train.state import build_state
from repa_fast.train.step import losses, synthetic_batch, train_step

TINY = {"hidden_size": 32, "depth": 3, "num_heads": 2, "encoder_depth": 2, "projector_dim": 32}
BATCH = 6


def make_state(**changes):
    """A state whose weights are nowhere zero; most gradients would be."""
    config = dataclasses.replace(
        presets.get("digits"), **TINY, batch_size=BATCH, report_to="none", **changes
    )
    world = World(rank=0, size=1, device=torch.device("cpu"))
    state = build_state(config, digits_metadata(), world)
    state.micro_batch = BATCH
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in state.model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1, generator=generator)
    state.ema.load_state_dict(state.model.state_dict())
    return state


def in_precision(state, batch, draws, dtype):
    """The state's model and what it gets, in `dtype`; the features are computed in fp32."""
    state.model.to(dtype)
    ((name, encoder),) = state.alignment.encoders.items()
    features = encoder(batch["image"]).to(dtype)
    state.alignment.encoders = {name: lambda image: features}
    batch = {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.items()}
    return batch, type(draws)(*(t.to(dtype) if t.is_floating_point() else t for t in draws))


def project(state, batch, draws):
    """(loss, gradients by parameter) of the project's step."""
    denoise, (aligned,) = losses(state, state.model, batch, draws)
    loss = denoise.mean() + state.config.proj_coeff * aligned.mean()
    loss.backward()
    return loss.item(), {n: p.grad for n, p in state.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize(
    "dtype, bound",
    # a loss rounds a few times; a gradient passes some tens of operations
    [(torch.float64, 1e-12), (torch.float32, 2e-5)],
)
def test_loss_and_gradients_are_those_of_the_project(tuned, dtype, bound):
    state = make_state()
    batch, draws = in_precision(state, *synthetic_batch(state, BATCH), dtype)
    draws.drop[:2] = torch.tensor([True, False])
    rival = Baseline(state, tuned=tuned, compiled=False)
    rival.model.to(dtype)
    rival.model.load_state_dict(state.model.state_dict())
    loss, gradients = project(state, batch, draws)
    denoise, aligned = rival.losses(batch, draws)
    found = denoise + state.config.proj_coeff * aligned
    found.backward()
    assert found.dtype == dtype
    assert found.item() == pytest.approx(loss, rel=bound)
    theirs = dict(rival.model.named_parameters())
    assert [n for n, p in theirs.items() if p.requires_grad] == list(gradients)
    for name, gradient in gradients.items():
        assert gradient.norm() > 0, name
        assert (theirs[name].grad - gradient).norm() <= bound * gradient.norm(), name


@pytest.mark.parametrize("tuned", [False, True])
def test_a_step_is_the_projects_step(tuned, monkeypatch):
    """Weights and averages after three steps with the project's draws."""
    state = make_state()
    batch, draws = synthetic_batch(state, BATCH)
    rival = Baseline(state, tuned=tuned, compiled=False)
    before = [p.detach().clone() for p in rival.model.parameters()]
    monkeypatch.setattr(rival, "draw", lambda size: draws)
    monkeypatch.setattr("repa_fast.train.step.draw_local", lambda state: draws)
    for _ in range(3):
        rival.step(batch)
        train_step(state, batch)
    rival.check()
    pairs = zip(rival.model.parameters(), state.model.parameters(), before)
    for number, (p, own, first) in enumerate(pairs):
        moved = (own - first).norm()
        # AdamW divides by the gradient's size: where it is about its rounding, so is the step
        assert (p - own).norm() <= 0.02 * moved, number
    for average, own in zip(rival.ema.parameters(), state.ema.parameters()):
        torch.testing.assert_close(average, own, rtol=1e-6, atol=1e-7)


def test_the_two_alignment_losses_are_one():
    torch.manual_seed(0)
    pairs = [[torch.randn(4, 9, width, dtype=torch.float64) for width in (5, 7)] for _ in range(2)]
    one_by_one = baseline.sample_by_sample(*pairs)
    torch.testing.assert_close(one_by_one, baseline.at_once(*pairs), rtol=1e-13, atol=0)
    assert baseline.at_once([pairs[0][0]], [3 * pairs[0][0]]).item() == pytest.approx(-1)


def test_only_the_released_recipe_reads_numbers(monkeypatch):
    """torch's own foreach AdamW reads its step counts, which it keeps on the host."""
    reads = []
    item = torch.Tensor.item

    def counted(tensor):
        if sys._getframe(1).f_code.co_filename == baseline.__file__:
            reads.append(tensor)
        return item(tensor)

    monkeypatch.setattr(torch.Tensor, "item", counted)
    for tuned in (False, True):
        state = make_state()
        batch, _ = synthetic_batch(state, BATCH)
        rival = Baseline(state, tuned=tuned, compiled=False)
        reads.clear()
        rival.step(batch)
        assert len(reads) == (0 if tuned else 3)


@pytest.mark.parametrize(
    "changes", [{"loss_type": "nt-xent"}, {"prediction": "noise"}, {"qk_norm": True}]
)
def test_what_the_recipe_does_not_do_is_refused(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"^{name} is .*, expected"):
        Baseline(make_state(**changes), tuned=False, compiled=False)


def test_a_loss_that_is_not_finite_gives_no_figure():
    rival = Baseline(make_state(), tuned=True, compiled=False)
    rival.loss = torch.tensor(float("nan"))
    with pytest.raises(RuntimeError, match="last loss is nan"):
        rival.check()


def test_every_block_of_the_rival_gets_a_contiguous_residual():
    """As in the project's model; compiled, another layout of the first is a graph more."""
    state, seen = make_state(), []
    rival = Baseline(state, tuned=True, compiled=False)
    for block in rival.model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    rival.losses(*synthetic_batch(state, BATCH))
    assert seen == [True] * TINY["depth"]
