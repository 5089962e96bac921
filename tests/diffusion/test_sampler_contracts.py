"""What all samplers have in common, whatever they integrate."""

from functools import partial

import pytest
import torch

from repa_fast import ops
from repa_fast.diffusion import ddpm_samplers, samplers
from repa_fast.diffusion.ddpm_samplers import ancestral, ddim
from repa_fast.diffusion.samplers import dopri5, euler, euler_maruyama
from tests.diffusion import chains, gaussians
from tests.diffusion.gaussians import LABELS, SHAPE, latents
from tests.refusals import refused

EXACT = {"rtol": 1e-11, "atol": 1e-11}


def adaptive(*arguments, num_steps, **options):
    """dopri5, which chooses its own steps."""
    return dopri5(*arguments, rtol=1e-2, atol=1e-2, **options)[0]


SAMPLERS = {
    "euler": (euler, gaussians.Model),
    "heun": (partial(euler, heun=True), gaussians.Model),
    "sde": (euler_maruyama, gaussians.Model),
    "dopri5": (adaptive, gaussians.Model),
    "ancestral": (ancestral, chains.Model),
    "ddim": (ddim, chains.Model),
    "eta": (partial(ddim, eta=1.0), chains.Model),
}


def samplers_of(*names):
    return pytest.mark.parametrize(
        "sampler, model", [pytest.param(*SAMPLERS[name], id=name) for name in names]
    )


every_sampler = samplers_of(*SAMPLERS)


@every_sampler
@pytest.mark.parametrize("scale", (1.0, 2.0, 0.0))
def test_guidance_is_one_call_for_both_labels_at_the_same_state(sampler, model, scale):
    """The null label is the model's number of classes."""
    model = model()
    model.num_classes = 20
    sampler(model, latents(), LABELS, num_steps=4, cfg_scale=scale)
    for x, _, y in model.calls:
        assert y.tolist() == [*LABELS.tolist(), *([20] * 3 if scale != 1 else [])]
        assert scale == 1 or torch.equal(x[:3], x[3:])


@every_sampler
def test_a_function_that_returns_its_output_alone_will_do_but_has_no_null_label(sampler, model):
    called, whole = model(), model()

    def alone(x, t, y):
        return called(x, t, y)[0]

    guided = partial(sampler, alone, latents(), LABELS, num_steps=2, cfg_scale=2.0)
    refused(guided, "num_classes")
    assert not called.calls
    results = [sampler(one, latents(), LABELS, num_steps=4) for one in (whole, alone)]
    assert torch.equal(*results)


@every_sampler
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("state_dtype", (torch.float32, torch.float64))
def test_model_and_state_have_the_asked_dtypes(sampler, model, dtype, state_dtype):
    model = model()
    options = {"num_steps": 3, "cfg_scale": 2.0, "state_dtype": state_dtype}
    result = sampler(model, latents(dtype), LABELS, **options)
    assert {x.dtype for x, _, _ in model.calls} == {dtype}
    assert result.dtype == state_dtype and result.shape == SHAPE
    assert {t.dtype for _, t, _ in model.calls} <= {torch.float32, torch.int64}


@every_sampler
@pytest.mark.parametrize("state_dtype", (torch.float32, torch.float64))
def test_a_model_that_answers_in_bf16_still_gets_the_state_in_the_dtype_of_the_latents(
    sampler, model, state_dtype
):
    model, options = model(), {"num_steps": 12, "state_dtype": state_dtype}
    answer = lambda x, t, y: model(x, t, y)[0].bfloat16()  # noqa: E731
    assert sampler(answer, latents(torch.float32), LABELS, **options).dtype == state_dtype
    assert {x.dtype for x in model.states} == {torch.float32}
    assert not any(torch.equal(x, x.bfloat16().float()) for x in model.states)


@every_sampler
def test_the_state_stays_fp64_between_calls_of_an_fp32_model(sampler, model):
    """Only what the model is asked, and what it answers, is rounded."""
    x = latents(torch.float32)
    result = sampler(model(), x, LABELS, num_steps=12)
    single = model()

    def rounding(x, t, y):
        return single(x.float(), t.float() if t.is_floating_point() else t, y)

    expected = sampler(rounding, x.double(), LABELS, num_steps=12)
    torch.testing.assert_close(result, expected, **EXACT)
    assert not torch.equal(result, result.float().double())


@every_sampler
def test_latents_are_left_as_they_are_and_nothing_is_recorded_for_autograd(sampler, model):
    x = latents().requires_grad_()
    result = sampler(model(), x, LABELS, num_steps=3)
    assert torch.equal(x, latents()) and not result.requires_grad


@samplers_of("sde", "ancestral", "eta")
def test_a_seed_gives_a_samples_noise_by_its_number_and_leaves_the_global_one_alone(sampler, model):
    """And does not depend on the batch."""
    state = torch.get_rng_state()
    index, at = torch.tensor([7, 2**40, 3]), slice(1, 2)
    noise = torch.stack([ops.standard_normal(SHAPE, 5, step, index) for step in range(11)])
    sampled = partial(sampler, model(), num_steps=12)
    given = sampled(latents(), LABELS, noise=noise)
    assert torch.equal(given, sampled(latents(), LABELS, seed=5, index=index))
    alone = sampled(latents()[at], LABELS[at], seed=5, index=index[at])
    torch.testing.assert_close(alone, given[at], **EXACT)
    for other in ({"seed": 6, "index": index}, {"seed": 5}):
        assert not torch.equal(given[at], sampled(latents(), LABELS, **other)[at])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "module, model, by_mode",
    (
        (samplers, gaussians.Model, {"ode": euler, "sde": euler_maruyama}),
        (ddpm_samplers, chains.Model, {"ode": ddim, "sde": ancestral}),
    ),
)
def test_sample_chooses_the_sampler_by_mode(module, model, by_mode):
    for mode, sampler in by_mode.items():
        options = {"num_steps": 5, "cfg_scale": 2.0}
        options |= {"seed": 3} if mode == "sde" else {}
        options |= {"heun": True} if sampler is euler else {}
        options |= {"guidance_interval": (0.1, 0.8)} if module is samplers else {}
        found = module.sample(model(), latents(), LABELS, mode=mode, **options)
        assert torch.equal(found, sampler(model(), latents(), LABELS, **options))
    wrong = partial(module.sample, model(), latents(), LABELS, mode="dpm")
    refused(wrong, "mode", "'dpm'", "ode", "sde")


@every_sampler
@pytest.mark.parametrize(
    "changes, words",
    (
        ({"labels": LABELS[:2]}, ("labels", r"\(2,\)", r"expected \(3,\)")),
        ({"labels": LABELS - 1}, ("labels", "-1", r"\[0, 10\]")),
        ({"labels": LABELS + 2}, ("labels", "11", r"\[0, 10\]")),
        ({"guidance_channels": 0}, ("guidance_channels", "0", "1 to 4")),
        ({"guidance_channels": 5}, ("guidance_channels", "5", "1 to 4")),
        ({"state_dtype": torch.bfloat16}, ("state_dtype", "bfloat16", "float32", "float64")),
    ),
)
def test_wrong_arguments_of_all_are_named_with_expected_and_got(sampler, model, changes, words):
    arguments = {"labels": LABELS, "num_steps": 4} | changes
    refused(partial(sampler, model(), latents(), **arguments), *words)


FLOW, LAST = "v, score, noise", "mean, euler, tweedie, none"
NOISE = ("noise", r"\(4, 3, 4", r"\(3, 3, 4, 2, 2\)")


@pytest.mark.parametrize(
    "name, changes, words",
    (
        ("euler", {"num_steps": 0}, ("num_steps", "0", "at least 1")),
        ("euler", {"prediction": "eps"}, ("prediction", "'eps'", FLOW)),
        ("sde", {"num_steps": 1}, ("num_steps", "1", "at least 2")),
        ("sde", {"prediction": "x"}, ("prediction", "'x'", FLOW)),
        ("sde", {"diffusion_form": "sbdm"}, ("diffusion_form", "'sbdm'", "SBDM")),
        ("sde", {"diffusion_norm": -1.0}, ("diffusion_norm", "-1.0", "at least 0")),
        ("sde", {"last_step": "Mean"}, ("last_step", "'Mean'", LAST)),
        ("sde", {"last_step_size": 0.0}, ("last_step_size", "0.0", "between 0 and 1")),
        ("sde", {"last_step_size": 1.0}, ("last_step_size", "1.0", "between 0 and 1")),
        ("dopri5", {"prediction": "eps"}, ("prediction", "'eps'", FLOW)),
        ("ancestral", {"num_steps": 1}, ("num_steps", "1", "2 to 1000")),
        ("ddim", {"num_steps": 1001}, ("num_steps", "1001", "2 to 1000")),
        *((name, {"noise": torch.zeros(4, *SHAPE)}, NOISE) for name in ("sde", "ancestral")),
        ("ancestral", {"seed": -1}, ("seed", "-1", r"0 <= seed < 2\^63")),
        ("ancestral", {"index": torch.arange(2)}, ("index", r"\(2,\)", r"expected \(3,\)")),
        ("ancestral", {"index": torch.arange(3.0)}, ("index", "float32", "int64")),
        ("ddim", {"eta": -0.1}, ("eta is -0.1, expected 0 to 1",)),
        ("ddim", {"eta": 1.1}, ("eta is 1.1, expected 0 to 1",)),
        ("ddim", {"eta": float("nan")}, ("eta is nan, expected 0 to 1",)),
    ),
)
def test_wrong_options_are_named_with_expected_and_got(name, changes, words):
    sampler, model = SAMPLERS[name]
    arguments = {"num_steps": 4} | changes
    refused(partial(sampler, model(), latents(), LABELS, **arguments), *words)
