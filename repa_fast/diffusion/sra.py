"""Self-representation alignment (SRA, arXiv 2505.02831): teacher times, losses and their weight.

The student is an earlier block's hidden state through repa_fast.models.projector.SimpleHead, the
teacher a later block's of the averaged weights, at less noise. "Released" below is the authors'
public code, whose default loss is "cos" today and was "sml1" in the paper's runs.
"""

import torch
import torch.nn.functional as F

from repa_fast.contracts import expect_choice, expect_floating, expect_shape, expect_tokens

KINDS = ("cos", "cos-features", "sml1", "l1", "l2")
OBJECTIVES = ("flow", "ddpm")
DDPM_STEPS = 1000
SMOOTH_L1_BETA = 0.05
IMAGENET_IMAGES = 1_281_167
"""Images of an epoch."""


def teacher_times(t: torch.Tensor, u: torch.Tensor, t_max: float) -> torch.Tensor:
    """Times of the teacher for flow: t - t_max u, clamped to [0, 1].

    Args:
        t: (B), times of the student in [0, 1], 1 is noise.
        u: (B), uniform in [0, 1].
        t_max: largest difference, in [0, 1]; 0.2 for the released SiT-XL/2.

    Returns:
        (B), in the dtype of t and u.

    Raises:
        ValueError: t_max out of range, or shapes that differ.
    """
    expect_shape("teacher_times", "u", u, t.shape)
    if not 0 <= t_max <= 1:
        raise ValueError(f"teacher_times: t_max is {t_max}, expected 0 to 1")
    return (t - t_max * u).clamp(0, 1)


def teacher_steps(t: torch.Tensor, u: torch.Tensor, t_max: float) -> torch.Tensor:
    """Steps of the teacher for DDPM: t - r, clamped to 1..999, r uniform on 0..int(1000 t_max) - 1.

    Args:
        t: (B), integer steps of the student in 0..999. At step 0 the teacher is at 1, as released.
        u: (B), uniform in [0, 1]; r = floor(u int(1000 t_max)).
        t_max: largest difference as a fraction of the steps; 0.2 for the released DiT-XL/2.

    Returns:
        (B), in the dtype of t.

    Raises:
        ValueError: a t_max without any step or above 1, shapes that differ, or a t of fractions.
    """
    expect_shape("teacher_steps", "u", u, t.shape)
    if t.is_floating_point():
        raise ValueError(f"teacher_steps: t has dtype {t.dtype}, expected an integer dtype")
    count = int(DDPM_STEPS * t_max)
    if not 1 <= count <= DDPM_STEPS:
        raise ValueError(
            f"teacher_steps: t_max is {t_max}, expected {1 / DDPM_STEPS} to 1, at least one step"
        )
    offset = (u * count).to(t.dtype).clamp(max=count - 1)  # fp32 can round up to count
    return (t - offset).clamp(1, DDPM_STEPS - 1)


def sra_loss(student: torch.Tensor, teacher: torch.Tensor, kind: str) -> torch.Tensor:
    """Distance of the student's hidden states to the teacher's, per sample.

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
    if kind == "cos":
        return 1 - F.cosine_similarity(student, teacher, dim=1).mean(1)
    if kind == "cos-features":
        return 1 - F.cosine_similarity(student, teacher, dim=2).mean(1)
    if kind == "sml1":
        distance = F.smooth_l1_loss(student, teacher, reduction="none", beta=SMOOTH_L1_BETA)
    elif kind == "l1":
        distance = (student - teacher).abs()
    else:
        distance = (student - teacher).square()
    return distance.mean((1, 2))


def align_weight(kind: str, images_seen: int, resolution: int, objective: str) -> float:
    """Weight of sra_loss in the total loss: the released constants and late decay.

    Cosines have 0.5 throughout. The others have c 0.1^e, c = 2 for flow and 0.4 for DDPM, where e
    is 1 up to and with a knee epoch and grows linearly from there: at 256 x 256 after epoch 149 by
    1 in 1000 epochs, at 512 x 512 after epoch 99 by 1 in 800. The epoch is the index, from 0, of
    the running epoch of ImageNet: images_seen // 1,281,167, whatever the dataset. The released
    loader drops an epoch's last, incomplete batch, so its epochs are up to a batch shorter.

    Args:
        kind: as for sra_loss. "cos-features", which the released code lacks, has the cosine's.
        images_seen: images trained on before this step, steps x global batch.
        resolution: of the images; 512 has its own decay, all others have that of 256.
        objective: "flow" or "ddpm".

    Raises:
        ValueError: unknown kind or objective, or one that has no released weight.
    """
    expect_choice("kind", kind, KINDS)
    expect_choice("objective", objective, OBJECTIVES)
    if objective == "ddpm" and kind != "sml1":
        raise ValueError(f"kind is {kind!r}, expected 'sml1': no other has a released DDPM weight")
    if kind in ("cos", "cos-features"):
        return 0.5
    knee, span = (99, 800) if resolution == 512 else (149, 1000)
    epoch = images_seen // IMAGENET_IMAGES
    exponent = 1 + max(0, epoch - knee) / span
    return (2.0 if objective == "flow" else 0.4) * 0.1**exponent
