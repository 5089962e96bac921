"""Hidden states against what the projectors are fed, and noise that belongs to the image."""

import inspect
from contextlib import contextmanager

import pytest
import torch

from repa_fast.analysis.hidden import collect, hidden_states, sample_noise
from repa_fast.data.dataset import Metadata
from repa_fast.diffusion.draws import stream
from repa_fast.diffusion.path import cosine, linear
from repa_fast.models.sit import SiT
from repa_fast.testing import seeded
from tests.refusals import refused

CLASSES, DEPTH, WIDTH, ROWS = 7, 3, 24, 10
EXACT = {"rtol": 1e-12, "atol": 1e-12}
ROUNDED = {"rtol": 2**-23, "atol": 2**-40}
"""The model computes in fp64, from latents whose fp32 values do not depend on the batch; what is
collected is rounded to fp32 once, to neighbouring numbers at worst."""
METADATA = Metadata(
    resolution=8, latent_shape=(2, 8, 8), vae="made up", scale=0.5, bias=0.25,
    class_names=tuple("abcdefg"),
)  # fmt: skip


def small(dtype=torch.float64):
    """A tiny model in eval mode whose every layer does something."""
    torch.manual_seed(0)
    model = SiT(
        input_size=8, in_channels=2, hidden_size=WIDTH, depth=DEPTH, num_heads=4, encoder_depth=1,
        num_classes=CLASSES, z_dims=(5,), projector_dim=6,
    )  # fmt: skip
    for layer in (*model.blocks, model.final_layer):
        torch.nn.init.normal_(layer.adaLN_modulation[1].weight, std=0.3)
        torch.nn.init.normal_(layer.adaLN_modulation[1].bias, std=0.3)
    torch.nn.init.normal_(model.y_embedder.embedding_table.weight)
    return model.to(dtype).eval().requires_grad_(False)


def pair(dtype=torch.float64):
    return [seeded((4, 2, 8, 8), seed=seed, dtype=dtype) for seed in (1, 2)]


def rows(index):
    """A batch of these rows of a made-up dataset."""
    mean, std = (seeded((ROWS, 2, 8, 8), seed=seed) for seed in (3, 4))
    moments = torch.cat([mean, std.abs()], dim=1)
    index = torch.tensor(index)
    return {"index": index, "moments": moments[index], "label": index % CLASSES}


def batches(*sizes):
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [rows(range(end - size, end)) for size, end in zip(sizes, ends)]


def collected(model, parts, times=(0.3, 0.8), count=ROWS, **options):
    return collect(model, parts, times, count=count, metadata=METADATA, **options)


@contextmanager
def fed_to_the_projector(model, depth):
    """What the projector of the block at this depth is fed."""
    model.encoder_depth, fed = depth, []
    with model.projectors[0].register_forward_hook(lambda _, inputs, __: fed.append(inputs[0])):
        yield fed


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("depth", range(1, DEPTH + 1))
@pytest.mark.parametrize("path, alpha, sigma", [
    (linear, 0.7, 0.3),
    (cosine, 0.8910065241883679, 0.45399049973954675),  # cos and sin of 0.3 * 90 degrees
])  # fmt: skip
def test_a_hidden_state_is_what_a_projector_there_is_fed(depth, path, alpha, sigma, training):
    model, (clean, noise) = small().train(training), pair()
    states = hidden_states(model, clean, noise, 0.3, path=path)
    with fed_to_the_projector(model, depth) as fed:
        time = torch.full((4,), 0.3, dtype=torch.float64)
        model(alpha * clean + sigma * noise, time, torch.full((4,), CLASSES), project=True)
    assert states.shape == (DEPTH, 4, WIDTH) and fed[0].shape == (4, 16, WIDTH)
    torch.testing.assert_close(states[depth - 1], fed[0].mean(1), **EXACT)


def test_under_autocast_the_state_is_still_fp32():
    model, (clean, noise) = small(torch.float32), pair(torch.float32)
    with torch.autocast("cpu", torch.bfloat16), fed_to_the_projector(model, 2) as fed:
        states = hidden_states(model, clean, noise, 0.3)
        time, null = torch.full((4,), 0.3), torch.full((4,), CLASSES)
        model(0.7 * clean + 0.3 * noise, time, null, project=True)
    assert states.dtype == fed[0].dtype == torch.float32
    assert torch.equal(states[1], fed[0].mean(1))


def test_no_label_can_come_in_and_the_model_sees_the_null_label_alone():
    assert list(inspect.signature(hidden_states).parameters) == [
        "model", "clean", "noise", "t", "path", "average",
    ]  # fmt: skip
    model, seen = small(), []
    model.y_embedder.register_forward_hook(lambda _, inputs, __: seen.append(inputs))
    parts = batches(4, 6)
    first = collected(model, parts)
    assert len(seen) == 4 and {tuple(y.tolist()) for y, _ in seen} == {(7,) * 4, (7,) * 6}
    assert all(drop is None for _, drop in seen)
    assert first.label.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]
    assert first.label.dtype == torch.int64 and first.hidden.dtype == torch.float32
    assert first.hidden.shape == (2, DEPTH, ROWS, WIDTH)
    second = collected(model, [part | {"label": part["label"] + 1} for part in parts])
    assert torch.equal(first.hidden, second.hidden)
    assert torch.equal(first.label + 1, second.label)


def test_the_model_is_left_as_it_was_and_neither_projectors_nor_gradients_run():
    model, (clean, noise) = small().requires_grad_(), pair()
    model.train().projectors[0].register_forward_hook(lambda *_: pytest.fail("projected"))
    assert not hidden_states(model, clean, noise, 0.5).requires_grad
    refused(lambda: hidden_states(model, clean[:, :1], noise[:, :1], 0.5), "latents have shape")
    assert not any(block._forward_hooks for block in model.blocks)


@pytest.mark.parametrize("sizes", [(1,) * 10, (3, 3, 3, 1)])
def test_an_image_brings_its_noise_in_any_batch_wherever_it_stands(sizes):
    model, order = small(), torch.tensor([7, 2, 9, 0, 4, 1, 8, 3, 6, 5])
    whole = collected(model, batches(10))
    found = collected(model, [rows(part.tolist()) for part in order.split(sizes)])
    torch.testing.assert_close(found.hidden, whole.hidden[:, :, order], **ROUNDED)
    assert torch.equal(found.label, whole.label[order])


@pytest.mark.parametrize("path", [linear, cosine])
def test_collected_states_are_those_of_the_posterior_sample(path):
    model, batch = small(), rows(range(10))
    got = collected(model, [batch], seed=5, path=path)
    mean, std = batch["moments"].split(2, dim=1)
    for image in (0, 9):
        draws = sample_noise(5, torch.tensor([image]), (2, 8, 8))[0]
        clean = (mean[image] + std[image] * draws[0]) * 0.5 + 0.25
        expected = hidden_states(model, clean[None], draws[1:], 0.8, path=path)[:, 0].float()
        torch.testing.assert_close(got.hidden[1, :, image], expected, **ROUNDED)


def test_noise_is_a_function_of_seed_and_index_and_none_of_trainings():
    noise = sample_noise(3, torch.tensor([4, 0, 9]), (2, 8, 8))
    assert noise.shape == (3, 2, 2, 8, 8) and noise.dtype == torch.float32
    for of_one, number in zip(noise, (4, 0, 9), strict=True):
        generator = stream(3, number, 0, 0)  # training's have fewer keys
        assert torch.equal(of_one, torch.randn(2, 2, 8, 8, generator=generator))


def infinite() -> SiT:
    """A model whose states single precision cannot hold."""
    model = small()
    model.x_embedder.proj.bias.fill_(1e39)
    assert hidden_states(model, *pair(), 0.3).isfinite().all()
    return model


TIMES = r"expected a time in \[0, 1\]"
UNBOUNDED = r"t = 0\.3 are not finite in torch\.float32, rows 0 to 9"


@pytest.mark.parametrize("call, message", [
    (lambda: collected(small(), []), "have 0 rows"),
    (lambda: collected(small(), batches(4, 5)), "have 9 rows, expected 10"),
    (lambda: collected(small(), 3 * batches(4)), "have 12 rows or more, expected 10"),
    (lambda: collected(infinite(), batches(10)), UNBOUNDED),
    (lambda: hidden_states(small(), *pair(), -0.1), TIMES),
    (lambda: hidden_states(small(), *pair(), 1.5), TIMES),
    (lambda: hidden_states(small(), *pair(), float("nan")), TIMES),
])  # fmt: skip
def test_other_numbers_of_rows_states_beyond_fp32_and_times_are_refused(call, message):
    refused(call, message)
