"""NT-Xent alignment of hidden states with a frozen encoder (REPA eq. 8, its contrastive form)."""

import torch
import torch.nn.functional as F

from repa_fast.contracts import expect_choice, expect_floating, expect_shape, expect_tokens
from repa_fast.distributed import World

NEGATIVES = ("image", "batch", "global")
EPS = 1e-12
"""Lower bound of the norms, as in repa_fast.ops.align_loss."""


def nt_xent(
    projection: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float = 0.1,
    negatives: str = "image",
    world: World | None = None,
    chunk: int = 1024,
) -> torch.Tensor:
    """Temperature-scaled cross-entropy of patches, mean over the patches of each sample.

    With cosine similarities, the loss of patch n of image b is

        -log( exp(cos(p_bn, z_bn) / temperature) / sum_k exp(cos(p_bn, z_k) / temperature) ),

    where k runs over a pool that contains (b, n). REPA (arXiv 2410.06940) names NT-Xent but states
    neither temperature nor pool, and its released code has none. The reading here: one direction,
    predictions are queries and targets are keys; SimCLR's temperature on ImageNet.

    The logits of at most max(chunk, B) queries are in memory at a time, twice: 8 max(chunk, B) K
    bytes in fp32, for a pool of K keys. Backward needs neither logits nor keys: the gradient of
    each query is formed beside its loss and kept, 4 B N Z bytes. Normalised keys take 4 K Z bytes
    ("image": 4 B N Z) until the call returns.

    Args:
        projection: (B, N, Z), projected hidden states, any floating dtype.
        target: (B, N, Z), the frozen encoder's patch tokens; receives no gradient.
        temperature: positive.
        negatives: the other patches of the same image ("image", K = N), of all images of this call
            ("batch", K = B N), or of this call on every process ("global", K = world size x B N).
            Micro-batches change the last two.
        world: needed for "global"; every process must call with the same shapes.
        chunk: queries whose logits are computed at a time; no influence but rounding.

    Returns:
        (B), one loss per sample, fp32 (fp64 for fp64 projections), also under autocast.

    Raises:
        ValueError: a shape, dtype, temperature, pool or chunk that does not fit.
    """
    batch, tokens, _ = expect_tokens("nt_xent", "projection", projection)
    expect_shape("nt_xent", "target", target, projection.shape)
    expect_floating("nt_xent", "target", target)
    expect_choice("negatives", negatives, NEGATIVES)
    if not temperature > 0:
        raise ValueError(f"nt_xent: temperature is {temperature}, expected a positive number")
    if chunk < 1:
        raise ValueError(f"nt_xent: chunk is {chunk}, expected at least 1")
    if negatives == "global" and world is None:
        raise ValueError('nt_xent: world is None, expected a World for negatives="global"')
    work = torch.promote_types(projection.dtype, torch.float32)
    first, keys = 0, target.detach()
    if negatives == "global":
        first, keys = world.rank * batch * tokens, world.gather(keys.contiguous())
    with torch.autocast(projection.device.type, enabled=False):
        queries = F.normalize(projection.to(work), dim=-1, eps=EPS)
        keys = F.normalize(keys.to(work), dim=-1, eps=EPS)
        if negatives != "image":  # one pool for all queries
            queries, keys = (x.reshape(1, -1, x.shape[-1]) for x in (queries, keys))
        losses = CrossEntropy.apply(queries, keys, first, temperature, chunk)
    return losses.view(batch, tokens).mean(1)


class CrossEntropy(torch.autograd.Function):
    """Queries (G, M, Z) against the keys (G, K, Z) of their group -> losses (G, M).

    The positive of query m is key first + m. A query's gradient depends on its own loss alone, so
    forward computes it up to the incoming factor, while the chunk's logits exist.
    """

    @staticmethod
    def forward(ctx, queries, keys, first, temperature, chunk):
        losses = queries.new_empty(queries.shape[:2])
        gradient = torch.empty_like(queries) if ctx.needs_input_grad[0] else None
        rows = max(1, chunk // len(queries))
        for start in range(0, queries.shape[1], rows):
            part = slice(start, start + rows)
            logits = (queries[:, part] / temperature) @ keys.mT  # (G, rows, K)
            total = logits.logsumexp(-1)
            positives = logits.diagonal(first + start, -2, -1)  # (G, rows), a view
            losses[:, part] = total - positives
            if gradient is not None:
                logits.sub_(total[..., None]).exp_()
                positives.sub_(1)  # softmax minus one-hot
                gradient[:, part] = (logits @ keys) / temperature
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx, dlosses):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # the kept gradient is a constant to autograd: terms would be missing silently
            raise RuntimeError("nt_xent cannot be differentiated twice (create_graph=True)")
        (gradient,) = ctx.saved_tensors
        return dlosses[..., None] * gradient, None, None, None, None
