"""NT-Xent against torch's cross-entropy, and across processes."""

import math

import pytest
import torch
import torch.nn.functional as F

from repa_fast.diffusion.alignment import NEGATIVES, nt_xent
from repa_fast.distributed import World
from repa_fast.testing import assert_within_budget, seeded
from tests.refusals import refused

ALONE = World(0, 1, torch.device("cpu"))
EXACT = {"rtol": 1e-12, "atol": 1e-12}
every_pool = pytest.mark.parametrize("negatives", NEGATIVES)


def pair(shape=(3, 4, 6), dtype=torch.float64):
    return seeded(shape, seed=1, dtype=dtype), seeded(shape, seed=2, dtype=dtype)


def plain(projection, target, temperature=0.1, negatives="image"):
    """torch's cross-entropy over the whole matrix of logits, in the dtype it is given."""
    batch, tokens, _ = projection.shape
    queries, keys = (F.normalize(x, dim=-1).flatten(0, 1) for x in (projection, target))
    logits, image = queries @ keys.mT / temperature, torch.arange(batch).repeat_interleave(tokens)
    if negatives == "image":
        logits = logits.masked_fill(image[:, None] != image, -torch.inf)
    losses = F.cross_entropy(logits, torch.arange(batch * tokens), reduction="none")
    return losses.view(batch, tokens).mean(1)


def with_gradient(loss, projection, target, weight=1.0, **options):
    """Losses and the gradient of their weighted sum."""
    leaf = projection.clone().requires_grad_()
    losses = loss(leaf, target, **options)
    (losses * weight).sum().backward()
    return losses.detach(), leaf.grad


@every_pool
@pytest.mark.parametrize(
    "chunk, temperature", ((1024, 0.1), (1, 0.07), (3, 1.0), (5, 0.1), (12, 0.07))
)
def test_losses_and_gradients_are_those_of_the_whole_matrix_for_every_chunk(
    negatives, chunk, temperature
):
    """By default with negatives of the image and a temperature of a tenth."""
    options = {"temperature": temperature, "negatives": negatives}
    weights = seeded((3,), seed=3, dtype=torch.float64)
    found = with_gradient(nt_xent, *pair(), weights, **options, world=ALONE, chunk=chunk)
    torch.testing.assert_close(found, with_gradient(plain, *pair(), weights, **options), **EXACT)
    torch.testing.assert_close(nt_xent(*pair()), plain(*pair()), **EXACT)


def test_it_is_not_differentiated_twice():
    projection, target = pair()
    loss = nt_xent(projection.requires_grad_(), target).sum()
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(loss, projection, create_graph=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("autocast", (False, True))
def test_it_is_computed_in_fp32_also_under_autocast(dtype, autocast):
    given, options = pair((4, 64, 32), dtype), {"negatives": "batch"}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses, gradient = with_gradient(nt_xent, *given, **options, chunk=100)
    (oracle, d_oracle), (working, d_working) = (
        with_gradient(plain, *(tensor.to(work) for tensor in given), **options)
        for work in (torch.float64, torch.float32)
    )
    assert losses.dtype == torch.float32 and gradient.dtype == dtype
    assert_within_budget("losses", losses, oracle, working)
    assert_within_budget("gradient", gradient, d_oracle, d_working.to(dtype))


def test_no_tensor_of_autograd_holds_the_logits():
    """Kept for backward: what has the size of the projection, whatever the pool."""
    projection, target = pair((8, 16, 4))
    kept = []
    keep = lambda x: kept.append(x.numel()) or x  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        nt_xent(projection.requires_grad_(), target, negatives="batch", chunk=16)
    assert kept and max(kept) == projection.numel() < (8 * 16) ** 2


@pytest.mark.parametrize("negatives, keys, least", (("image", 8, 4), ("batch", 32, 1)))
@pytest.mark.parametrize("chunk", (1, 24, 64))
def test_no_more_logits_than_of_a_chunk_exist_at_once(negatives, keys, least, chunk, monkeypatch):
    shapes, matmul = [], torch.Tensor.__matmul__
    spy = lambda a, b: shapes.append((a.shape, b.shape)) or matmul(a, b)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "__matmul__", spy)
    nt_xent(*pair((4, 8, 5)), negatives=negatives, chunk=chunk)
    queries = [a[0] * a[1] for a, _ in shapes]
    assert sum(queries) == 32 and max(queries) <= max(chunk, least)
    assert {b[-1] for _, b in shapes} == {keys}


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
    losses, gradient = with_gradient(nt_xent, projection, target, temperature=temperature)
    assert losses.isfinite().all() and gradient.isfinite().all()
    if "target" in zeros:  # all keys of the image have the cosine 0
        assert losses[0].item() == pytest.approx(math.log(4), rel=1e-6)


def test_a_pool_of_one_key_has_no_loss():
    assert nt_xent(*pair((3, 1, 6))).tolist() == [0, 0, 0]


def collect(world, negatives, dtype):
    """Losses and gradient of this process's share of 4 samples."""
    local = 4 // world.size
    mine = slice(world.rank * local, (world.rank + 1) * local)
    share = (tensor[mine] for tensor in pair((4, 3, 5), dtype))
    return with_gradient(nt_xent, *share, negatives=negatives, world=world, chunk=2)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, torch.finfo().eps * 16)]
)
def test_two_processes_are_one_with_the_pool_of_both(ranks, dtype, tolerance):
    losses, gradient = map(torch.cat, zip(*ranks(collect, "global", dtype)))
    whole, d_whole = collect(ALONE, "batch", dtype)
    torch.testing.assert_close(losses, whole, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, d_whole)
    assert not torch.allclose(losses, collect(ALONE, "image", dtype)[0])


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
