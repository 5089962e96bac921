"""NT-Xent against loops over queries and keys, and across processes."""

import math

import pytest
import torch
import torch.nn.functional as F

from repa_fast.diffusion.alignment import nt_xent
from repa_fast.distributed import World
from repa_fast.testing import assert_within_budget, seeded
from tests.diffusion import contrasting
from tests.refusals import refused

ALONE = World(0, 1, torch.device("cpu"))
POOLS = ("image", "batch", "global")
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def pair(shape=(3, 4, 6), dtype=torch.float64):
    return seeded(shape, seed=1, dtype=dtype), seeded(shape, seed=2, dtype=dtype)


def of_loops(projection, target, temperature, negatives):
    """The definition with Python numbers."""
    batch, tokens, _ = projection.shape
    losses = []
    for b in range(batch):
        images = [b] if negatives == "image" else range(batch)
        loss = 0.0
        for n in range(tokens):
            similar = {
                (i, k): math.exp(cosine(projection[b, n], target[i, k]) / temperature)
                for i in images
                for k in range(tokens)
            }
            loss -= math.log(similar[b, n] / sum(similar.values()))
        losses.append(loss / tokens)
    return torch.tensor(losses, dtype=torch.float64)


def cosine(a, b):
    a, b = a.tolist(), b.tolist()
    return sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b)


def of_autograd(projection, target, temperature, negatives):
    """torch's cross-entropy over the whole matrix of logits, in the working dtype."""
    batch, tokens, _ = projection.shape
    logits = (
        F.normalize(projection, dim=-1).flatten(0, 1) @ F.normalize(target, dim=-1).flatten(0, 1).mT
    )
    image = torch.arange(batch).repeat_interleave(tokens)
    if negatives == "image":
        logits = logits.masked_fill(image[:, None] != image, -torch.inf)
    losses = F.cross_entropy(logits / temperature, torch.arange(batch * tokens), reduction="none")
    return losses.view(batch, tokens).mean(1)


@pytest.mark.parametrize("negatives", POOLS)
@pytest.mark.parametrize("temperature", (0.07, 0.1, 1.0))
def test_it_is_the_definition(negatives, temperature):
    """By default with negatives of the image and a temperature of a tenth."""
    projection, target = pair()
    default = of_loops(projection, target, 0.1, "image")
    torch.testing.assert_close(nt_xent(projection, target), default, **EXACT)
    losses = nt_xent(projection, target, temperature=temperature, negatives=negatives, world=ALONE)
    expected = of_loops(projection, target, temperature, negatives)
    torch.testing.assert_close(losses, expected, **EXACT)


@pytest.mark.parametrize("negatives", POOLS)
@pytest.mark.parametrize("chunk", (1, 3, 5, 12, 1024))
def test_gradients_are_those_of_autograd_for_every_chunk(negatives, chunk):
    projection, target = pair()
    weights = seeded((3,), seed=3, dtype=torch.float64)
    found, expected = projection.requires_grad_(), projection.detach().clone().requires_grad_()
    losses = nt_xent(found, target, negatives=negatives, world=ALONE, chunk=chunk)
    reference = of_autograd(expected, target, 0.1, negatives)
    torch.testing.assert_close(losses, reference, **EXACT)
    (losses * weights).sum().backward()
    (reference * weights).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, **EXACT)


def test_it_is_not_differentiated_twice():
    projection, target = pair()
    loss = nt_xent(projection.requires_grad_(), target).sum()
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(loss, projection, create_graph=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("autocast", (False, True))
def test_it_is_computed_in_fp32_also_under_autocast(dtype, autocast):
    projection, target = pair((4, 64, 32), dtype)
    grads = []
    for function, cast in (
        (lambda p, z: nt_xent(p, z, negatives="batch", chunk=100), lambda x: x),
        (lambda p, z: of_autograd(p, z, 0.1, "batch"), torch.Tensor.double),
        (lambda p, z: of_autograd(p, z, 0.1, "batch"), torch.Tensor.float),
    ):
        leaf = cast(projection).clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and not grads):
            losses = function(leaf, cast(target))
        losses.sum().backward()
        grads.append((losses.detach(), leaf.grad))
    (found, dfound), (oracle, doracle), (working, dworking) = grads
    assert found.dtype == torch.float32 and dfound.dtype == dtype
    assert_within_budget("losses", found, oracle, working)
    assert_within_budget("gradient", dfound, doracle, dworking.to(dtype))


def test_no_tensor_of_autograd_holds_the_logits():
    """Kept for backward: what has the size of the projection, whatever the pool."""
    projection, target = pair((8, 16, 4))
    kept = []
    keep = lambda x: kept.append(x.numel()) or x  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        nt_xent(projection.requires_grad_(), target, negatives="batch", chunk=16)
    assert kept and max(kept) == projection.numel() < (8 * 16) ** 2


@pytest.mark.parametrize("negatives", ("image", "batch"))
@pytest.mark.parametrize("chunk", (1, 24, 64))
def test_no_more_logits_than_of_a_chunk_exist_at_once(negatives, chunk, monkeypatch):
    shapes = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: shapes.append((a, b)) or matmul(a, b)
    )
    projection, target = pair((4, 8, 5))
    nt_xent(projection, target, negatives=negatives, chunk=chunk)
    queries = [a.shape[0] * a.shape[1] for a, _ in shapes]
    assert sum(queries) == 32 and max(queries) <= max(chunk, 4 if negatives == "image" else 1)
    assert {b.shape[-1] for _, b in shapes} == {8 if negatives == "image" else 32}


def test_a_pool_of_one_key_has_no_loss():
    projection, target = pair((3, 1, 6))
    assert torch.equal(nt_xent(projection, target), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(
    "zeros, temperature",
    (("projection", 0.1), ("target", 0.1), ("projection, target", 0.1), ("", 1e-3)),
)
def test_zero_vectors_and_low_temperatures_are_finite_with_their_gradients(zeros, temperature):
    projection, target = pair(dtype=torch.float32)
    if "projection" in zeros:
        projection[0, 1] = 0
    if "target" in zeros:
        target[0] = 0
    losses = nt_xent(projection.requires_grad_(), target, temperature=temperature)
    losses.sum().backward()
    assert losses.isfinite().all() and projection.grad.isfinite().all()
    if "target" in zeros:  # all keys of the image have the cosine 0
        assert losses[0].item() == pytest.approx(math.log(4), rel=1e-6)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, torch.finfo().eps * 16)]
)
def test_two_processes_are_one_with_the_pool_of_both(ranks, dtype, tolerance):
    expected = contrasting.collect(ALONE, "batch", dtype)
    parts = ranks(contrasting.collect, "global", dtype)
    losses = torch.cat([part["losses"] for part in parts])
    torch.testing.assert_close(losses, expected["losses"], rtol=tolerance, atol=tolerance)
    gradient = torch.cat([part["gradient"] for part in parts])
    torch.testing.assert_close(gradient, expected["gradient"])
    assert not torch.allclose(losses, contrasting.collect(ALONE, "image", dtype)["losses"])


@pytest.mark.parametrize(
    "options, parts",
    (
        ({"temperature": 0.0}, ("temperature", "0.0", "positive")),
        ({"temperature": -1.0}, ("temperature", "-1.0")),
        ({"temperature": math.nan}, ("temperature", "nan")),
        ({"chunk": 0}, ("chunk", "0", "at least 1")),
        ({"negatives": "all"}, ("negatives", "'all'", "image, batch, global")),
        ({"negatives": "global"}, ("world", "None", "World")),
    ),
)
def test_options_that_do_not_fit_are_named(options, parts):
    refused(lambda: nt_xent(*pair(), **options), *parts)
