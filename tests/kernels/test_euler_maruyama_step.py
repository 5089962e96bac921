import functools
import math

import pytest
import torch

from repa_fast import ops
from repa_fast.diffusion.path import linear
from repa_fast.kernels.euler_maruyama_step.reference import _philox, standard_normal
from repa_fast.testing import assert_within_budget, seeded
from tests.kernels import checks
from tests.kernels.table import BF16, F16, F32, F64, OPS
from tests.refusals import refused

OP = OPS["euler_maruyama_step"]
SHAPE = (3, 4, 6, 50)  # 1,200 elements: a sample is more than one program
STATES = (F32, F64)
VELOCITIES = (F32, BF16, F16, F64)
PATHS = ("linear", "cosine")
# Each word of counter and key: low, above 2^31, above 2^32.
SEEDS = (0, 1, 2**31 + 5, 2**32 - 1, 2**40 + 3, 2**63 - 1)
STEPS = (0, 1, 249, 2**31 - 1)
NUMBERS = (0, 1, 2**31 + 7, 2**32 - 1, 2**32, 2**50 + 2**31)


def inputs(state=F32, velocity=F32, shape=SHAPE, **plain):
    """All arguments, noise among them; the state is N(0, 1)."""
    return OP.arguments(shape, dtype=velocity) | {"x": seeded(shape, seed=1, dtype=state)} | plain


def expect_step(run, arguments, **drawing):
    """The equations, within the budget in fp32 and to 1e-12 in fp64, and the rounded copy.

    drawing is seed, step and index, in place of the noise.
    """
    x, z = arguments["x"], arguments["noise"]
    rounded = z
    if drawing:
        numbers = [drawing[name] for name in ("seed", "step", "index")]
        arguments, rounded = arguments | {"noise": None}, standard_normal(x.shape, *numbers)
        z = normal(x.shape, *numbers)
    (new, copy), _ = run(OP.name, arguments | drawing)

    def exact(z, work=F64):
        return OP.results(arguments | {"noise": z}, None, work)[0][0]

    if x.dtype == F32:
        assert_within_budget("next state", new, exact(z), exact(rounded, F32))
    elif drawing:
        scale = math.sqrt(arguments["diffusion"] * abs(arguments["dt"]))
        assert_within_budget("z", ((new - exact(None)) / scale).float(), z, rounded)
    else:
        torch.testing.assert_close(new, exact(z), rtol=0, atol=1e-12 * exact(z).abs().max().item())
    assert new.dtype == x.dtype and copy.dtype == arguments["v_cond"].dtype
    assert torch.equal(copy, new.to(copy.dtype))


def drawn(run, shape, seed, step=0, index=None):
    """The numbers that a step adds: from x = v = 0 with w |dt| = 1 they are the next state."""
    zero = torch.zeros(shape)
    arguments = {"x": zero, "v_cond": zero, "v_uncond": None, "index": index}
    plain = {"t": 0.5, "dt": -1.0, "path": "linear", "diffusion": 1.0, "seed": seed, "step": step}
    return run(OP.name, arguments | plain)[0][0]


def normal(shape, seed, number, index):
    """Box and Muller's transform of the first two words of Philox 4x32-10, in fp64."""
    position, sample = torch.arange(math.prod(shape[1:]))[None], index[:, None]
    counter = position, sample % 2**32, torch.full_like(sample, number), sample // 2**32
    words = _philox(counter, (seed % 2**32, seed // 2**32))
    first, second = (word.double().expand(len(index), -1) / 2**32 for word in words[:2])
    radius = (-2 * (first + 2.0**-33).log()).sqrt()
    return (radius * (2 * math.pi * second).cos()).reshape(shape)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("velocity", VELOCITIES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("cfg", (None, 0.0, 1.0, 4.0))
def test_a_step_with_given_noise_is_the_sde_of_the_paper(run, state, velocity, path, cfg):
    guidance = {"v_uncond": None} if cfg is None else {"cfg_scale": cfg}
    for t, dt in ((1.0, -0.04), (0.37, -0.004)):
        arguments = inputs(state, velocity, path=path, t=t, dt=dt, diffusion=2 * t)
        expect_step(run, arguments | guidance)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("path", PATHS)
def test_a_step_with_drawn_noise_and_the_last_one_are_the_sde_of_the_paper(run, state, path):
    """Of the velocities one may be fp64 and the other bf16."""
    arguments = inputs(state, BF16, path=path, t=0.4, dt=-0.004, diffusion=0.8)
    arguments["v_uncond"] = inputs(velocity=F64)["v_uncond"]
    expect_step(run, arguments, seed=7, step=3, index=torch.tensor([5, 2**32 + 5, 3]))
    last = inputs(state, path=path, t=0.04, dt=-0.04, diffusion=0.08, noise=None)
    expect_step(run, last)  # which has the drift and no noise


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("velocity", VELOCITIES)
def test_without_diffusion_it_is_the_step_of_euler(run, state, velocity):
    arguments = inputs(state, velocity, v_uncond=None, diffusion=0.0)
    plain = arguments | {"noise": None}
    expect_step(run, plain)
    expected = run(OP.name, plain)
    for other in (plain | {"t": 0.1, "path": "cosine"}, arguments, plain | {"seed": 1}):
        torch.testing.assert_close(run(OP.name, other), expected, rtol=0, atol=0)


def test_numbers_of_samples_may_lie_anyhow_in_memory(run):
    for index in (torch.tensor([4, 9]).expand(3, 2)[:, 0], torch.arange(6)[::2]):
        contiguous = drawn(run, (3, 5, 24), 1, index=index.contiguous())
        assert torch.equal(drawn(run, (3, 5, 24), 1, index=index), contiguous)


@pytest.mark.parametrize("shape", ((0, 4, 8), (2, 0), (3,), (1, 1), (2, 1024), (1, 1025)))
def test_states_may_have_any_shape(run, shape):
    arguments = inputs(velocity=BF16, shape=shape)
    (new, copy), _ = run(OP.name, arguments)
    assert new.shape == copy.shape == drawn(run, shape, 3).shape == shape
    if len(shape) > 1 and new.numel() > 1:
        expect_step(run, arguments | {"noise": None, "diffusion": 0.0})


# https://github.com/DEShawResearch/random123, tests/kat_vectors: philox4x32 10
@pytest.mark.parametrize(
    "counter_and_key, expected",
    (
        ("00000000 " * 6, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 6, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ),
)
def test_philox_gives_the_published_words(counter_and_key, expected):
    *counter, first, second = (int(word, 16) for word in counter_and_key.split())
    got = _philox(tuple(torch.tensor([word]) for word in counter), (first, second))
    assert " ".join(f"{word.item():08x}" for word in got) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_drawn_noise_is_that_of_philox_for_every_step_and_sample(run, seed):
    index = torch.tensor(NUMBERS)
    shape = (len(NUMBERS), 3, 5)
    draws = [drawn(run, shape, seed, number, index) for number in STEPS]
    working = [standard_normal(shape, seed, number, index) for number in STEPS]
    oracle = [normal(shape, seed, number, index) for number in STEPS]
    assert_within_budget("z", *(torch.stack(v) for v in (draws, oracle, working)))


def test_positions_beyond_one_program_have_their_own_numbers(run):
    index = torch.arange(2)
    working, oracle = (f((2, 2500), 3, 0, index) for f in (standard_normal, normal))
    assert_within_budget("z", drawn(run, (2, 2500), 3), oracle, working)


def test_drawn_noise_depends_on_the_samples_number_and_not_on_its_batch(run):
    whole = drawn(run, (5, 40), 3)
    index = torch.tensor([3, 0, 4])
    assert torch.equal(drawn(run, (3, 40), 3, index=index), whole[index])
    assert torch.equal(drawn(run, (5, 40), 3, index=torch.arange(5)), whole)
    assert torch.equal(drawn(run, (5, 4, 10), 3), whole.view(5, 4, 10))
    assert torch.equal(drawn(run, (5, 17), 3), whole[:, :17])
    arguments = inputs(noise=None, seed=5, step=3, index=torch.arange(3))
    assert run.inside(checks.modified, OP.name, arguments, None) == []


def test_drawn_noise_is_standard_normal():
    z = standard_normal((64, 4096), 11, 2, torch.arange(64)).double()
    count = z.numel()
    assert abs(z.mean()) < 4 / count**0.5
    assert abs(z.square().mean() - 1) < 4 * (2 / count) ** 0.5
    assert abs((z**3).mean()) < 4 * (15 / count) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / count) ** 0.5
    assert (z.mean(1).abs() < 4.5 / 64).all() and (z.mean(0).abs() < 5 / 8).all()
    ordered = torch.special.ndtr(z.flatten().sort().values)
    steps = torch.arange(count, dtype=F64) / count
    distance = torch.maximum((ordered - steps).max(), (steps + 1 / count - ordered).max())
    assert distance < 1.95 / count**0.5  # Kolmogorov and Smirnov, 0.1 %


@pytest.mark.parametrize("varied", ("sample", "step", "seed", "position"))
def test_drawn_numbers_are_independent(varied):
    count = 4096
    one = torch.zeros(1, dtype=torch.int64)
    if varied == "sample":
        numbers = torch.tensor([*range(24), *(2**32 + i for i in range(8)), 2**33, 2**50])
        z = standard_normal((len(numbers), count), 1, 1, numbers)
    elif varied == "step":
        z = torch.cat([standard_normal((1, count), 1, step, one) for step in range(32)])
    elif varied == "seed":
        seeds = [*range(16), *(2**32 * i for i in range(1, 9)), *(2**63 - i for i in range(1, 9))]
        z = torch.cat([standard_normal((1, count), seed, 1, one) for seed in seeds])
    else:
        long = standard_normal((1, count + 32), 1, 1, one)[0]
        z = torch.stack([long[lag : lag + count] for lag in range(32)])
    for values in (z.double(), z.double().square() - 1):
        correlations = torch.corrcoef(values).fill_diagonal_(0)
        assert correlations.abs().max() < 5 / count**0.5


ONES = torch.ones(2, 8)
step = functools.partial(ops.euler_maruyama_step, t=0.5, dt=-0.1, path=linear, diffusion=1.0)


@pytest.mark.parametrize("which", ("x", "v_cond", "v_uncond", "noise"))
def test_a_gradient_is_refused_and_one_that_nobody_records_is_not(which):
    tensors = dict.fromkeys(("x", "v_cond", "v_uncond", "noise"), ONES)
    tensors[which] = ONES.clone().requires_grad_()
    refused(lambda: step(**tensors), f"euler_maruyama_step: {which} requires a gradient")
    with torch.no_grad():
        step(**tensors)


@pytest.mark.parametrize(
    "argument, wrong, words",
    (
        ("x", ONES.bfloat16(), ("torch.bfloat16", "fp32 or fp64")),
        ("x", ONES.long(), ("torch.int64", "fp32 or fp64")),
        ("x", torch.tensor(1.0), (r"\(\)", r"\(B, \.\.\.\)")),
        ("v_cond", torch.ones(2, 7), (r"\(2, 7\)", r"\(2, 8\)")),
        ("v_cond", ONES.long(), ("torch.int64", "floating")),
        ("v_uncond", torch.ones(1, 8), (r"\(1, 8\)", r"\(2, 8\)")),
        ("v_uncond", ONES.bool(), ("torch.bool", "floating")),
        ("noise", torch.ones(2, 8, 1), (r"\(2, 8, 1\)", r"\(2, 8\)")),
        ("noise", ONES.int(), ("torch.int32", "floating")),
        ("noise", ONES, ("and seed are both given",)),
        ("index", torch.arange(3), (r"\(3,\)", r"\(2,\)")),
        ("index", torch.arange(2).int(), ("torch.int32", "torch.int64")),
        ("index", torch.arange(2, device="meta"), ("meta", "cpu")),
        ("seed", -1, ("step 0", "-1, .*expected 0 <= seed")),
        ("seed", 2**63, (str(2**63), "expected 0 <= seed")),
        ("step", -1, ("seed 0", "-1, expected 0 <= seed")),
        ("step", 2**31, (str(2**31), "expected 0 <= seed")),
    ),
)
def test_wrong_arguments_are_named_with_expected_and_got(argument, wrong, words):
    numbers = {"seed": 0} if argument in ("noise", "index", "step") else {}
    arguments = dict.fromkeys(("x", "v_cond", "v_uncond"), ONES) | numbers | {argument: wrong}
    refused(lambda: step(**arguments), f"^euler_maruyama_step: .*{argument} ", *words)
