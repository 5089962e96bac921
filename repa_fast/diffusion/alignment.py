"""Alignment of hidden states: with a frozen encoder (REPA), or with a later block's (SRA).

REPA (arXiv 2410.06940, eq. 8) has `cosine_losses` and its contrastive form, `nt_xent`. SRA (arXiv
2505.02831) aligns an earlier block's hidden state, through repa_fast.models.projector.SimpleHead,
with a later block's of the EMA at less noise: `teacher_times` or `teacher_steps`, and `sra_loss`.
"Released" below is SRA's public code, whose default loss is "cos" today and was "sml1" in the
paper's runs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from repa_fast import ops
from repa_fast.contracts import expect_choice, expect_floating, expect_shape, expect_tokens
from repa_fast.diffusion.ddpm import NUM_STEPS
from repa_fast.distributed import World

NEGATIVES = ("image", "batch", "global")
KINDS = ("cos", "cos-features", "sml1", "l1", "l2")


def cosine_losses(projections: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
    """Compute the negative patch-wise cosine similarity of each encoder, per sample.

    Args:
        projections: (B, N, Z_k) for encoder k, from the model's projectors.
        targets: (B, N, Z_k) for encoder k, patch tokens of the clean images.

    Returns:
        One (B) tensor per encoder; REPA's loss is their mean.

    Raises:
        ValueError: as many projections as targets were expected, or shapes differ.
    """
    if len(projections) != len(targets):
        raise ValueError(
            f"alignment: {len(projections)} projections for {len(targets)} encoders; "
            "the model needs one projector per encoder"
        )
    return [ops.align_loss(p, z) for p, z in zip(projections, targets, strict=True)]


def nt_xent(
    projection: Tensor,
    target: Tensor,
    *,
    temperature: float = 0.1,
    negatives: str = "image",
    world: World | None = None,
    chunk: int = 1024,
) -> Tensor:
    """Compute the temperature-scaled cross-entropy of patches, mean over each sample's patches.

    With cosine similarities, the loss of patch n of image b is

        -log( exp(cos(p_bn, z_bn) / temperature) / sum_k exp(cos(p_bn, z_k) / temperature) ),

    where k runs over a pool that contains (b, n). REPA names NT-Xent but states neither temperature
    nor pool, and its released code has none. The reading here: predictions are queries, targets are
    keys, in one direction; SimCLR's temperature on ImageNet.

    The logits of at most max(chunk, B) queries are in memory at a time, twice: 8 max(chunk, B) K
    bytes in fp32, for a pool of K keys. Backward needs neither logits nor keys: each gradient is
    formed with its loss, 4 B N Z bytes. During the call keys take 4 K Z bytes ("image": 4 B N Z).

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
        queries, keys = (F.normalize(x.to(work), dim=-1) for x in (projection, keys))
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


def teacher_times(t: Tensor, u: Tensor, t_max: float) -> Tensor:
    """Return the teacher's times for flow, (B): t - t_max u, clamped to [0, 1].

    t (B) are the student's times in [0, 1], 1 is noise; u (B) is uniform in [0, 1]; t_max is the
    largest difference, in [0, 1], 0.2 for the released SiT-XL/2. ValueError for a t_max out of
    range, or shapes that differ.
    """
    expect_shape("teacher_times", "u", u, t.shape)
    if not 0 <= t_max <= 1:
        raise ValueError(f"teacher_times: t_max is {t_max}, expected 0 to 1")
    return (t - t_max * u).clamp(0, 1)


def teacher_steps(t: Tensor, u: Tensor, t_max: float) -> Tensor:
    """Return the teacher's steps for DDPM, (B): t - r, clamped to 1..999.

    t (B) are the student's integer steps in 0..999; at step 0 the teacher is at 1, as released.
    r = floor(u int(1000 t_max)), with u (B) uniform in [0, 1] and t_max a fraction of the steps,
    0.2 for the released DiT-XL/2. ValueError for a t_max without any step or above 1, shapes that
    differ, or a t of fractions.
    """
    expect_shape("teacher_steps", "u", u, t.shape)
    if t.is_floating_point():
        raise ValueError(f"teacher_steps: t has dtype {t.dtype}, expected an integer dtype")
    count = int(NUM_STEPS * t_max)
    if not 1 <= count <= NUM_STEPS:
        raise ValueError(
            f"teacher_steps: t_max is {t_max}, expected {1 / NUM_STEPS} to 1, at least one step"
        )
    offset = (u * count).to(t.dtype).clamp(max=count - 1)  # fp32 can round up to count
    return (t - offset).clamp(1, NUM_STEPS - 1)


def sra_loss(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Compute the distance of the student's hidden states to the teacher's, per sample.

    Args:
        student: (B, N, D), after the head, any floating dtype.
        teacher: (B, N, D), raw; receives no gradient.
        kind: "cos", 1 - cosine over the N tokens, mean over channels (what the released code
            computes); "cos-features", 1 - cosine over the D features, mean over tokens; "sml1",
            smooth L1 with beta 0.05 (the paper's runs); "l1" or "l2", means over all elements.

    Returns:
        (B), fp32 (fp64 for fp64 students).

    Raises:
        ValueError: unknown kind, or a shape or dtype that does not fit.
    """
    expect_tokens("sra_loss", "student", student)
    expect_shape("sra_loss", "teacher", teacher, student.shape)
    expect_floating("sra_loss", "teacher", teacher)
    expect_choice("kind", kind, KINDS)
    work = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(work), teacher.detach().to(work)
    if kind.startswith("cos"):
        over = 1 if kind == "cos" else 2
        return 1 - F.cosine_similarity(student, teacher, dim=over).mean(1)
    if kind == "sml1":
        distance = F.smooth_l1_loss(student, teacher, reduction="none", beta=0.05)
    elif kind == "l1":
        distance = (student - teacher).abs()
    else:
        distance = (student - teacher).square()
    return distance.mean((1, 2))
