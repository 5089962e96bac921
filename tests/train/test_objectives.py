"""Every kind of alignment through the trainer: what is aligned with what, and what it costs."""

import pytest
import torch

pytest.importorskip("lance")
pytest.importorskip("timm")

from repa_fast import encoders
from repa_fast.checkpoint import formats
from repa_fast.checkpoint.export import official_contents
from repa_fast.data import dataset
from repa_fast.data.latents import to_pixels
from repa_fast.diffusion.alignment import sra_loss
from repa_fast.diffusion.ddpm import Diffusion, ddpm_losses
from repa_fast.diffusion.draws import stream
from repa_fast.eval.load import load
from repa_fast.eval.pictures import arrange
from repa_fast.train import checkpoint, resume
from repa_fast.train.evaluate import sample_grid
from repa_fast.train.report import read_metrics
from repa_fast.train.step import draw_local, losses, synthetic_batch, train_step
from tests.diffusion import gaussians
from tests.refusals import refused
from tests.train.conftest import assert_same
from tests.train.parallel_ranks import DDPM, PLAIN, SRA

RELEASED = {"loss_type": "sml1", "align_decay": "sra"}
CONV = {"projector": "conv", "spatial_norm": True}
OBJECTIVES = {
    "conv-noise": CONV | {"prediction": "noise", "weighting": "lognormal"},
    "dit-sra": DDPM | SRA | RELEASED,
    "sra-until": SRA | {"align_until": 3},
}
MORE_OBJECTIVES = {
    "vanilla": PLAIN,
    "cosine": {},
    "nt-xent": {"loss_type": "nt-xent"},
    "nt-xent-batch": {"loss_type": "nt-xent", "nt_xent_negatives": "batch"},
    "sra": SRA,
    "sra-paper": SRA | RELEASED | {"block_out_t": 2},
    "dit": DDPM | PLAIN,
    "dit-repa": DDPM | {"mode": "sde"},
    "noise-sra": SRA | {"prediction": "noise"},
    "score": {"prediction": "score", "path_type": "VP", "loss_weight": "likelihood"},
    "vp": {"path_type": "VP", "mode": "sde"},
    "until": {"align_until": 3},
}
HEAVY = [pytest.param(name, marks=pytest.mark.heavy) for name in MORE_OBJECTIVES]


@pytest.mark.parametrize("name", [*OBJECTIVES, *HEAVY])
def test_stopped_and_resumed_is_the_undisturbed_run(train, monkeypatch, name):
    """With samples in the end, and without images where no encoder sees them."""
    options = (OBJECTIVES | MORE_OBJECTIVES)[name] | {"sampling_steps": 5, "num_steps": 2}
    expected = ["align/sra" if "sra" in name else "align/digits-vit"]
    expected = [] if name in ("vanilla", "dit") else expected
    if expected != ["align/digits-vit"]:
        monkeypatch.setattr(dataset, "decode", lambda *_: 1 / 0)
    whole = train("whole", **options)
    train("cut", **options, max_train_steps=2)
    cut = train("cut", **options, resume="auto")
    assert load(whole).digest == load(cut).digest
    lines = [
        [{k: v for k, v in line.items() if "second" not in k and "stall" not in k} for line in of]
        for of in (read_metrics(whole / "metrics.jsonl"), read_metrics(cut / "metrics.jsonl"))
    ]
    assert lines[0] == lines[1]
    assert (cut / "samples.png").exists()
    assert [key for key in lines[0][-1] if key.startswith("align/")] == expected
    assert ("variational" in lines[0][-1]) == name.startswith("dit")


def moving(state, size=6):
    """A state whose average differs from its weights, and a batch."""
    with torch.no_grad():
        for parameter in state.ema.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.manual_seed(2)))
    return synthetic_batch(state, size)


def latents(batch, draws):
    mean, std = batch["moments"].chunk(2, 1)
    return mean + std * draws.posterior_noise


@pytest.mark.parametrize("block", [2, 3])
def test_the_teacher_is_the_average_s_hidden_state(make_state, block):
    state = make_state(**SRA | {"block_out_t": block, "t_max": 0.3})
    batch, draws = moving(state)
    clean, heard = latents(batch, draws), {}
    (teacher,) = state.alignment.targets(batch, clean, draws, state.objective, state.ema)

    def keep(module, inputs, outputs):
        x, branch, gate = outputs
        heard["state"] = x + gate[:, None] * branch

    state.ema.blocks[block - 1].register_forward_hook(keep)
    t = (draws.t - 0.3 * draws.offset).clamp(0, 1)
    noisy, _ = state.objective.path.interpolate(clean, draws.noise, t)
    with torch.no_grad():
        state.ema(noisy, t, batch["label"], draws.drop)
    assert torch.allclose(teacher, heard["state"], atol=1e-6) and not teacher.requires_grad


def test_only_blocks_up_to_the_student_s_and_the_head_learn_from_the_teacher(make_state):
    state = make_state(**SRA | {"block_out_s": 2})
    batch, draws = moving(state)
    _, (aligned,) = losses(state, state.model, batch, draws)
    aligned.sum().backward()
    moved = {n for n, p in state.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(name.startswith("ap_head.") for name in moved)
    assert any(name.startswith("blocks.1.") for name in moved)
    assert not any(name.startswith(("blocks.2.", "final_layer.")) for name in moved)
    assert all(p.grad is None for p in state.ema.parameters())


@pytest.mark.parametrize("kind", ["cos", "cos-features", "sml1", "l1", "l2"])
def test_the_loss_is_the_one_that_is_asked_for(make_state, kind):
    state = make_state(**SRA | {"loss_type": kind})
    batch, draws = moving(state)
    _, (aligned,) = losses(state, state.model, batch, draws)
    clean = latents(batch, draws)
    (teacher,) = state.alignment.targets(batch, clean, draws, state.objective, state.ema)
    noisy, _ = state.objective.path.interpolate(clean, draws.noise, draws.t)
    hidden = state.model.hidden(noisy, draws.t, batch["label"], draws.drop, depth=1)
    assert torch.allclose(aligned, sra_loss(state.model.ap_head(hidden), teacher, kind), atol=1e-6)


@pytest.mark.parametrize(
    "overrides, weights",
    [
        ({}, {"align/digits-vit": 0.7}),
        (DDPM, {"variational": 1, "align/digits-vit": 0.7}),
        (SRA | {"loss_type": "sml1"}, {"align/sra": 0.7}),
        (SRA | RELEASED, {"align/sra": 0.2}),
    ],
)
def test_the_total_is_denoising_and_the_other_losses_times_their_weights(
    make_state, overrides, weights
):
    """That of alignment is proj_coeff, or the released one."""
    state = make_state(**overrides, proj_coeff=0.7)
    batch, _ = moving(state, state.local_batch)
    train_step(state, batch)
    found = state.metrics.read(state.world)
    expected = found["denoise"] + sum(weight * found[name] for name, weight in weights.items())
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert -1 <= found.get("align/digits-vit", 0) <= 1


def test_encoders_are_dropped_when_alignment_ends_and_not_loaded_again(train, monkeypatch):
    calls = []
    loaded = encoders.load

    def counting(*arguments):
        encoder = loaded(*arguments)
        encoder.register_forward_hook(lambda *_: calls.append(1))
        return encoder

    monkeypatch.setattr(encoders, "load", counting)
    whole = train(align_until=3)
    assert len(calls) == 3
    values = [line["align/digits-vit"] for line in read_metrics(whole / "metrics.jsonl")]
    assert all(value != 0 for value in values[:3]) and values[3:] == [0, 0]
    monkeypatch.setattr(encoders, "load", lambda *_: 1 / 0)
    train(align_until=3, max_train_steps=7, resume="auto")


def test_after_its_end_alignment_leaves_the_heads_as_they_are(make_state):
    """The first micro-batches come when they are frozen, as in a run that is resumed then."""
    state = make_state(align_until=1, mixed_precision="bf16")
    batch, _ = synthetic_batch(state, state.local_batch)
    train_step(state, batch)
    state.end_alignment()
    before = [p.clone() for p in state.model.projectors.parameters()]
    trunk = state.model.blocks[0].mlp.fc1.weight.clone()
    state.micro_batch = 5
    train_step(state, {name: t for name, t in batch.items() if name != "image"})
    assert_same(state.model.projectors.parameters(), before)
    assert not any(p.grad is not None for p in state.model.projectors.parameters())
    assert not torch.equal(trunk, state.model.blocks[0].mlp.fc1.weight)


def test_an_official_file_of_a_dit_with_sra_goes_on_whatever_its_order(make_state, tmp_path):
    state = make_state(**DDPM | SRA)
    batch, _ = synthetic_batch(state, state.local_batch)
    train_step(state, batch)
    state.step = 4
    contents = official_contents(checkpoint.save(tmp_path, state))
    assert {"ap_head.linear1.weight", "ap_head.linear2.bias"} <= contents["model"].keys()
    names = list(contents["model"])
    order = sorted(names, key=lambda name: (name.startswith("ap_head."), names.index(name)))
    assert order != names  # SRA's own order is not known here: the head last
    states = contents["opt"]["state"]
    contents["opt"]["state"] = {
        place: states[names.index(name)]
        for place, name in enumerate(order)
        if names.index(name) in states
    }
    for key in ("model", "ema"):
        contents[key] = {name: contents[key][name] for name in order}
    file = tmp_path / "step-4.pt"
    torch.save(contents | {"steps": 4, "epoch": 0}, file)
    other = make_state(**DDPM | SRA, seed=5)
    resume.load_official(file, other)
    assert other.step == 4
    found, expected = (
        {n: t for n, t in checkpoint.tensors(each).items() if not n.endswith(".step")}
        for each in (other, state)
    )
    assert found.keys() == expected.keys()
    assert_same(found.values(), expected.values())
    sampled = formats.read_weights(file, learn_sigma=True)
    assert not any(name.startswith("ap_head.") for name in sampled)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"align": "sra", "loss_type": "nt-xent"}, "loss_type is 'nt-xent', expected one of cos, "),
        ({"loss_type": "sml1"}, "loss_type is 'sml1', expected one of cos, nt-xent with align re"),
        ({"align": "sra", "block_out_s": 3, "block_out_t": 3}, "expected 1 <= block_out_s < block"),
        (SRA | {"block_out_t": 4}, "block_out_t is 4, expected at most the depth, 3"),
        ({"align_decay": "sra"}, "needs --align sra"),
        ({"align_until": -1}, "align_until is -1"),
        ({"align": "sra", "t_max": 1.5}, "t_max 1.5"),
        (DDPM | {"prediction": "noise"}, "'noise', expected the default with --obj"),
        (DDPM | {"loss_weight": "velocity"}, "loss_weight is 'velocity', expected"),
        ({"path_type": "VP", "loss_weight": "likelihood"}, "expected none with --prediction v"),
        ({"prediction": "eps"}, "prediction is 'eps', expected one of v, score, noise"),
        ({"prediction": "noise", "loss_weight": "snr"}, "'snr', expected one of none, velocity, l"),
    ],
)
def test_settings_that_do_not_go_together(make_state, overrides, message):
    refused(lambda: make_state(**overrides), message)


# DiT.


def test_ddpm_trains_on_noise_and_variance_at_integer_times(make_state):
    state = make_state(**DDPM | PLAIN)
    batch, draws = synthetic_batch(state, 6)
    seen = []
    state.model.t_embedder.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    denoise, (variational,) = losses(state, state.model, batch, draws)
    t = (draws.t * 1000).long()
    assert torch.equal(seen[0], t)
    clean, chain = latents(batch, draws), Diffusion.linear()
    noisy = chain.q_sample(clean, draws.noise, t)
    output, _ = state.model(noisy, t, batch["label"], draws.drop)
    assert output.shape[1] == 2 * clean.shape[1]
    expected = ddpm_losses(chain, output, clean, draws.noise, t)
    assert torch.allclose(denoise, expected.simple, rtol=1e-5)
    assert torch.allclose(variational, expected.variational, rtol=1e-4)


def test_sra_s_teacher_on_dit_is_at_an_earlier_integer_time(make_state):
    state = make_state(**OBJECTIVES["dit-sra"])
    batch, draws = moving(state)
    seen = []
    state.ema.t_embedder.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    losses(state, state.model, batch, draws)
    student = (draws.t * 1000).long()
    assert not seen[0].is_floating_point() and seen[0].min() >= 1
    assert ((student - seen[0]).clamp(min=0) < 200).all() and (seen[0] < student).any()


def test_the_original_dit_s_weights_start_a_dit_with_both_halves(make_state, tmp_path):
    state = make_state(**DDPM | PLAIN)
    torch.save(state.model.state_dict(), tmp_path / "DiT.pt")
    other = make_state(**DDPM | PLAIN, seed=5)
    assert resume.start_from(tmp_path / "DiT.pt", "dit", other) == []
    assert_same(other.ema.parameters(), state.model.parameters())
    flow = make_state(**PLAIN)
    resume.start_from(tmp_path / "DiT.pt", "dit", flow)
    of_flow, of_dit = (len(s.model.final_layer.linear.weight) for s in (flow, state))
    assert of_flow * 2 == of_dit


# Predictions.


@pytest.mark.parametrize("loss_weight", ["none", "velocity", "likelihood"])
@pytest.mark.parametrize("path", ["linear", "cosine", "VP"])
@pytest.mark.parametrize("prediction", ["score", "noise"])
def test_scores_and_noise_are_trained_on_the_noise(make_state, prediction, path, loss_weight):
    flow = {"prediction": prediction, "path_type": path, "loss_weight": loss_weight}
    state = make_state(**flow | PLAIN)
    batch, draws = moving(state)
    coefficients = state.objective.path.coefficients(draws.t)
    alpha, sigma, d_alpha, d_sigma = (c.view(-1, 1, 1, 1) for c in coefficients)
    noisy = alpha * latents(batch, draws) + sigma * draws.noise
    output, _ = state.model(noisy, draws.t, batch["label"], draws.drop)
    noise = -sigma * output if prediction == "score" else output
    rate = d_sigma - sigma * d_alpha / alpha
    weight = {"none": torch.ones(()), "velocity": rate**2, "likelihood": rate / sigma}[loss_weight]
    expected = (weight * (noise - draws.noise).square()).mean((1, 2, 3))
    denoise, others = losses(state, state.model, batch, draws)
    assert others == [] and torch.allclose(denoise, expected, rtol=1e-5)


def test_a_step_draws_its_times_for_the_prediction(make_state):
    whole, inner = (draw_local(make_state(**PLAIN, prediction=p)).t for p in ("v", "noise"))
    assert torch.allclose(inner, 0.001 + 0.998 * whole, rtol=0, atol=1e-7)
    assert (inner - whole).abs().max() > 1e-4


@pytest.mark.parametrize("path", ["linear", "GVP", "VP"])
@pytest.mark.parametrize("prediction", ["v", "score", "noise"])
def test_grids_of_the_exact_prediction_are_where_its_flow_leads(make_state, prediction, path):
    """A model of Gaussian data: that the sampler knows what it predicts shows in the pixels."""
    flow = {"prediction": prediction, "path_type": path, "num_steps": 100, "cfg_scale": 1.0}
    state = make_state(**flow | PLAIN)
    state.ema = gaussians.Model(path, prediction)
    noise = torch.randn((100, 3, 16, 16), generator=stream(state.config.seed, 0))
    alpha, sigma, *_ = gaussians.coefficients(path, 0.0)
    mean, std = gaussians.means(torch.arange(100) % 10, 3), gaussians.STD
    clean = mean + std / (alpha**2 * std**2 + sigma**2) ** 0.5 * (noise - alpha * mean)
    expected = arrange(to_pixels(clean, state.metadata), 10).astype(int)
    # In 255ths: a hundred of Euler's steps, and the thousandths of time that are left out.
    assert abs(sample_grid(state, state.ema) - expected).mean() < 2


@pytest.mark.parametrize("prediction, sign", [("v", -1), ("score", 1), ("noise", 1)])
def test_the_original_sit_s_predictions_keep_their_meaning(make_state, tmp_path, prediction, sign):
    """Its time runs the other way, which turns velocities around and nothing else."""
    original = make_state(**PLAIN).model.eval()
    torch.save(original.state_dict(), tmp_path / "SiT.pt")
    state = make_state(**PLAIN, prediction=prediction, seed=5)
    assert resume.start_from(tmp_path / "SiT.pt", "sit", state) == []
    x, t, y = torch.randn(4, 3, 16, 16), torch.linspace(0, 1, 4), torch.arange(4)
    expected = sign * original(x, 1 - t, y)[0]
    for model in (state.model, state.ema):
        # fp32: the turned time features are other sums of 256 products.
        bound = 1e-4 * expected.abs().max().item()
        assert torch.allclose(model(x, t, y)[0], expected, rtol=0, atol=bound)
