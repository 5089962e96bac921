import functools
import math

import numpy as np
import pytest
import torch

from repa_fast import ops
from repa_fast.diffusion.path import linear
from repa_fast.kernels.euler_maruyama_step.reference import _philox, standard_normal
from repa_fast.testing import assert_within_budget, seeded
from tests.kernels import checks

SHAPE = (3, 4, 6, 50)  # 1,200 elements: a sample is more than one program
STATES = (torch.float32, torch.float64)
VELOCITIES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Each word of counter and key: low, above 2^31, above 2^32.
SEEDS = (0, 1, 2**31 + 5, 2**32 - 1, 2**40 + 3, 2**63 - 1)
STEPS = (0, 1, 249, 2**31 - 1)
NUMBERS = (0, 1, 2**31 + 7, 2**32 - 1, 2**32, 2**50 + 2**31)


@pytest.fixture(params=checks.EVERYWHERE)
def advance(request):
    """advance(x, v_cond, v_uncond, t, dt, path's name, ...) -> (next state, copy)."""
    call = checks.caller(request, request.param)

    def advance(x, v_cond, v_uncond, t, dt, path="linear", *, noise=None, index=None, **plain):
        tensors = {"x": x, "v_cond": v_cond, "v_uncond": v_uncond, "noise": noise, "index": index}
        results, changed = call(checks.step, tensors, {"t": t, "dt": dt, **plain}, path)
        assert not changed
        return results

    return advance


def inputs(state=torch.float32, velocity=torch.float32, shape=SHAPE):
    """x, v_cond, v_uncond, noise."""
    velocities = (seeded(shape, seed=seed, dtype=velocity) for seed in (2, 3))
    return seeded(shape, seed=1, dtype=state), *velocities, seeded(shape, seed=4, dtype=velocity)


def formula(x, v_cond, v_uncond, t, dt, path, *, w=0.0, cfg=1.0, z=None, work=torch.float64):
    """REPA eq. 6 and 7."""
    x, v, null, z = (None if u is None else u.to(work) for u in (x, v_cond, v_uncond, z))
    if null is not None:
        v = null + cfg * (v - null)
    angle = math.pi / 2 * t
    alpha, sigma, d_alpha, d_sigma = {
        "linear": (1 - t, t, -1.0, 1.0),
        "cosine": (
            math.cos(angle),
            math.sin(angle),
            -math.pi / 2 * math.sin(angle),
            math.pi / 2 * math.cos(angle),
        ),
    }[path]
    score = (alpha * v - d_alpha * x) / (d_alpha * sigma - alpha * d_sigma) / sigma
    new = x + (v - w / 2 * score) * dt
    return new if z is None else new + math.sqrt(w * abs(dt)) * z


def expect_step(advance, args, t, dt, path, *, w=0.0, cfg=1.0, noise=None, **drawing):
    """The equations, within the budget in fp32 and to 1e-12 in fp64, and the rounded copy.

    drawing is seed, step and index.
    """
    x, v_cond, _ = args
    new, copy = advance(*args, t, dt, path, noise=noise, diffusion=w, cfg_scale=cfg, **drawing)
    z = rounded = noise
    if drawing:
        numbers = drawing["seed"], drawing["step"], drawing["index"]
        z, rounded = normal(x.shape, *numbers), standard_normal(x.shape, *numbers)
    exact = functools.partial(formula, *args, t, dt, path, w=w, cfg=cfg)
    if x.dtype == torch.float32:
        working = exact(z=rounded, work=torch.float32)
        assert_within_budget("next state", new, exact(z=z), working)
    else:
        assert new.dtype == torch.float64
        if drawing:
            scale = math.sqrt(w * abs(dt))
            assert_within_budget("z", ((new - exact()) / scale).float(), z, rounded)
        else:
            oracle = exact(z=z)
            assert (new - oracle).abs().max() <= 1e-12 * oracle.abs().max()
    assert copy.dtype == v_cond.dtype
    assert torch.equal(copy, new.to(v_cond.dtype))


def drawn(advance, shape, seed, step=0, index=None):
    """The numbers that a step adds: from x = v = 0 with w |dt| = 1 they are the next state."""
    zero = torch.zeros(shape)
    drawing = {"seed": seed, "step": step, "index": index}
    return advance(zero, zero, None, 0.5, -1.0, diffusion=1.0, **drawing)[0]


def words(shape, seed, number, index):
    """The first two words of Philox 4x32-10 for every element, in numpy."""
    low = np.uint64(2**32 - 1)
    number_ = np.full((1, 1), number, np.uint64)
    index = index.numpy().astype(np.uint64)[:, None]
    position = np.arange(math.prod(shape[1:]), dtype=np.uint64)[None]
    c = list(np.broadcast_arrays(position, index & low, number_, index >> np.uint64(32)))
    k = [seed % 2**32, seed >> 32]
    for _ in range(10):
        p, q = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high = [v >> np.uint64(32) for v in (q, p)]
        c = [high[0] ^ c[1] ^ np.uint64(k[0]), q & low, high[1] ^ c[3] ^ np.uint64(k[1]), p & low]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[0].reshape(shape), c[1].reshape(shape)


def normal(shape, seed, number, index):
    """Box and Muller's transform of these words in fp64."""
    first, second = (v.astype(np.float64) / 2**32 for v in words(shape, seed, number, index))
    radius = np.sqrt(-2 * np.log(first + 2.0**-33))
    return torch.from_numpy(radius * np.cos(2 * math.pi * second))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("velocity", VELOCITIES)
@pytest.mark.parametrize("path", ("linear", "cosine"))
@pytest.mark.parametrize("guided", (False, True))
def test_a_step_with_given_noise_is_the_sde_of_the_paper(advance, state, velocity, path, guided):
    x, v_cond, v_uncond, noise = inputs(state, velocity)
    args = (x, v_cond, v_uncond if guided else None)
    for t, dt in ((1.0, -0.04), (0.37, -0.004)):
        expect_step(advance, args, t, dt, path, w=2 * t, cfg=1.8, noise=noise)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("path", ("linear", "cosine"))
def test_a_step_with_drawn_noise_is_the_sde_of_the_paper(advance, state, path):
    args = inputs(state, torch.bfloat16)[:3]
    drawing = {"seed": 7, "step": 3, "index": torch.tensor([5, 2**32 + 5, 3])}
    expect_step(advance, args, 0.4, -0.004, path, w=0.8, cfg=1.8, **drawing)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("path", ("linear", "cosine"))
def test_the_last_step_has_the_drift_of_the_sde_and_no_noise(advance, state, path):
    args = inputs(state)[:3]
    expect_step(advance, args, 0.04, -0.04, path, w=0.08, cfg=1.8)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("velocity", VELOCITIES)
def test_without_diffusion_it_is_the_step_of_euler(advance, state, velocity):
    x, v_cond, *_, noise = inputs(state, velocity)
    expect_step(advance, (x, v_cond, None), 0.5, -0.02, "linear")
    plain = advance(x, v_cond, None, 0.5, -0.02)
    for other in (
        advance(x, v_cond, None, 0.1, -0.02, "cosine"),
        advance(x, v_cond, None, 0.5, -0.02, noise=noise),
        advance(x, v_cond, None, 0.5, -0.02, seed=1),
    ):
        torch.testing.assert_close(other, plain, rtol=0, atol=0)


def test_a_step_one_percent_wrong_exceeds_the_budget():
    args = inputs(velocity=torch.bfloat16)
    oracle, working = (
        formula(*args[:3], 0.5, -0.004, "linear", w=1.0, cfg=1.8, z=args[3], work=work)
        for work in (torch.float64, torch.float32)
    )
    with pytest.raises(AssertionError, match="next state: "):
        assert_within_budget("next state", 1.01 * working, oracle, working)


@pytest.mark.parametrize("cfg", (0.0, 1.0, 4.0))
def test_guidance_extrapolates_from_the_null_velocity(advance, cfg):
    x, v_cond, v_uncond, _ = inputs()
    expect_step(advance, (x, v_cond, v_uncond), 0.5, -0.02, "linear", cfg=cfg)


@pytest.mark.parametrize("velocities", ((0, 1), (1, 0), (1, 2), (3, 1)))
def test_velocities_and_noise_may_have_their_own_dtypes(advance, velocities):
    cond, uncond = (VELOCITIES[i] for i in velocities)
    x, v_cond, v_uncond, noise = inputs()
    args = (x, v_cond.to(cond), v_uncond.to(uncond))
    expect_step(advance, args, 0.5, -0.02, "linear", w=1.0, cfg=1.8, noise=noise.to(uncond))


@pytest.mark.parametrize("layout", ("transposed", "sliced", "expanded over samples"))
def test_tensors_may_lie_anyhow_in_memory(advance, layout):
    x, v_cond, v_uncond, noise = map(checks.TOKENS[layout], inputs(shape=(3, 5, 24)))
    expect_step(advance, (x, v_cond, v_uncond), 0.5, -0.02, "linear", w=1.0, cfg=1.8, noise=noise)
    index = torch.tensor([4, 9, 9, 9, 2]).expand(3, 5)[:, 0]
    contiguous = drawn(advance, (3, 5, 24), 1, index=index.contiguous())
    assert torch.equal(drawn(advance, (3, 5, 24), 1, index=index), contiguous)
    every_second = torch.arange(6)[::2]
    contiguous = drawn(advance, (3, 5, 24), 1, index=every_second.contiguous())
    assert torch.equal(drawn(advance, (3, 5, 24), 1, index=every_second), contiguous)


@pytest.mark.parametrize("shape", ((0, 4, 8), (2, 0), (3,), (1, 1), (2, 1024), (1, 1025)))
def test_states_may_have_any_shape(advance, shape):
    x, v_cond, v_uncond, noise = inputs(velocity=torch.bfloat16, shape=shape)
    new, copy = advance(x, v_cond, v_uncond, 0.5, -0.02, noise=noise, diffusion=1.0, cfg_scale=1.8)
    assert new.shape == copy.shape == shape
    assert drawn(advance, shape, 3).shape == shape
    if len(shape) > 1 and x.numel() > 1:
        expect_step(advance, (x, v_cond, v_uncond), 0.5, -0.02, "linear", cfg=1.8)


def test_two_evaluations_agree_in_every_bit(advance):
    x, v_cond, v_uncond, _ = inputs(velocity=torch.bfloat16)
    first, second = (
        advance(x, v_cond, v_uncond, 0.5, -0.02, diffusion=1.0, cfg_scale=1.8, seed=5, step=3)
        for _ in range(2)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# https://github.com/DEShawResearch/random123, tests/kat_vectors: philox4x32 10
@pytest.mark.parametrize(
    "counter, key, expected",
    (
        ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ),
)
def test_philox_gives_the_published_words(counter, key, expected):
    got = _philox(tuple(torch.tensor([word]) for word in counter), key)
    assert " ".join(f"{word.item():08x}" for word in got) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_drawn_noise_is_that_of_philox_for_every_step_and_sample(advance, seed):
    index = torch.tensor(NUMBERS)
    shape = (len(NUMBERS), 3, 5)
    draws = [drawn(advance, shape, seed, number, index) for number in STEPS]
    working = [standard_normal(shape, seed, number, index) for number in STEPS]
    oracle = [normal(shape, seed, number, index) for number in STEPS]
    assert_within_budget("z", *(torch.stack(v) for v in (draws, oracle, working)))


def test_positions_beyond_one_program_have_their_own_numbers(advance):
    index = torch.arange(2)
    working, oracle = (f((2, 2500), 3, 0, index) for f in (standard_normal, normal))
    assert_within_budget("z", drawn(advance, (2, 2500), 3), oracle, working)


def test_drawn_noise_depends_on_the_samples_number_and_not_on_its_batch(advance):
    whole = drawn(advance, (5, 40), 3)
    index = torch.tensor([3, 0, 4])
    assert torch.equal(drawn(advance, (3, 40), 3, index=index), whole[index])
    assert torch.equal(drawn(advance, (5, 40), 3, index=torch.arange(5)), whole)
    assert torch.equal(drawn(advance, (5, 4, 10), 3), whole.view(5, 4, 10))
    assert torch.equal(drawn(advance, (5, 17), 3), whole[:, :17])


def test_drawn_noise_is_standard_normal():
    z = standard_normal((64, 4096), 11, 2, torch.arange(64)).double()
    count = z.numel()
    assert abs(z.mean()) < 4 / count**0.5
    assert abs(z.square().mean() - 1) < 4 * (2 / count) ** 0.5
    assert abs((z**3).mean()) < 4 * (15 / count) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / count) ** 0.5
    assert (z.mean(1).abs() < 4.5 / 64).all() and (z.mean(0).abs() < 5 / 8).all()
    ordered = torch.special.ndtr(z.flatten().sort().values)
    steps = torch.arange(count, dtype=torch.float64) / count
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


@pytest.mark.parametrize("which", ("x", "v_cond", "v_uncond", "noise"))
def test_a_gradient_is_refused_and_one_that_nobody_records_is_not(which):
    x, v_cond, v_uncond, noise = inputs(shape=(2, 4))
    tensors = {"x": x, "v_cond": v_cond, "v_uncond": v_uncond, "noise": noise}
    tensors[which].requires_grad_()
    options = {"t": 0.5, "dt": -0.02, "path": linear, "diffusion": 1.0}
    with pytest.raises(ValueError, match=rf"euler_maruyama_step: {which} requires a gradient"):
        ops.euler_maruyama_step(**tensors, **options)
    with torch.no_grad():
        ops.euler_maruyama_step(**tensors, **options)


def test_noise_and_seed_together_are_refused():
    x, v, _, noise = inputs(shape=(2, 4))
    with pytest.raises(ValueError, match="euler_maruyama_step: noise and seed are both given"):
        ops.euler_maruyama_step(x, v, None, 0.5, -0.1, path=linear, noise=noise, seed=0)


@pytest.mark.parametrize("seed, number", ((-1, 0), (2**63, 0), (0, -1), (0, 2**31), (2**64, 2**40)))
def test_seed_and_step_have_a_range(seed, number):
    x, v, *_ = inputs(shape=(2, 4))
    with pytest.raises(ValueError) as error:
        ops.euler_maruyama_step(x, v, None, 0.5, -0.1, path=linear, seed=seed, step=number)
    for part in ("euler_maruyama_step: ", f"seed {seed}", f"step {number}", "expected 0 <= seed"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "argument, wrong, got, expected",
    (
        ("x", torch.ones(2, 8, dtype=torch.bfloat16), "torch.bfloat16", "fp32 or fp64"),
        ("x", torch.ones(2, 8).long(), "torch.int64", "fp32 or fp64"),
        ("x", torch.tensor(1.0), "()", "(B, ...)"),
        ("v_cond", torch.ones(2, 7), "(2, 7)", "(2, 8)"),
        ("v_cond", torch.ones(2, 8).long(), "torch.int64", "floating"),
        ("v_uncond", torch.ones(1, 8), "(1, 8)", "(2, 8)"),
        ("v_uncond", torch.ones(2, 8).bool(), "torch.bool", "floating"),
        ("noise", torch.ones(2, 8, 1), "(2, 8, 1)", "(2, 8)"),
        ("noise", torch.ones(2, 8).int(), "torch.int32", "floating"),
        ("index", torch.arange(3), "(3,)", "(2,)"),
        ("index", torch.arange(2).int(), "torch.int32", "torch.int64"),
        ("index", torch.arange(2, device="meta"), "meta", "cpu"),
    ),
)
def test_wrong_arguments_are_named_with_expected_and_got(argument, wrong, got, expected):
    ones = torch.ones(2, 8)
    tensors = {"x": ones, "v_cond": ones, "v_uncond": ones} | {argument: wrong}
    options = {"seed": 0} if argument == "index" else {}
    with pytest.raises(ValueError) as error:
        ops.euler_maruyama_step(**tensors, t=0.5, dt=-0.1, path=linear, **options)
    for part in ("euler_maruyama_step: ", f"{argument} ", got, expected):
        assert part in str(error.value)
