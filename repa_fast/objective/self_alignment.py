"""SRA: hidden states are aligned with later ones of the model's EMA (arXiv 2505.02831)."""

from repa_fast.contracts import expect_choice
from repa_fast.diffusion.alignment import KINDS, sra_loss
from repa_fast.models.flops import transformer_flops
from repa_fast.objective.base import Alignment

IMAGENET_IMAGES = 1_281_167
RELEASED = {"flow": 2.0, "ddpm": 0.4}
"""Weights that the released code starts from, by objective."""


class SelfAlignment(Alignment):
    """One head, compared with a later block of the EMA at an earlier time."""

    name = "sra"
    paper = "SRA, 2505.02831"
    losses_known = KINDS
    decays_known = ("constant", "linear", "sra")
    title = "SRA's teacher"
    heads = ("sra",)

    def __init__(self, config) -> None:
        super().__init__(config)
        self.teacher_depth = config.block_out_t

    @classmethod
    def check(cls, config):
        """Raise ValueError also for encoders beside it, or a teacher below the student."""
        for name, none in (("enc_type", "none"), ("features", "")):
            if getattr(config, name) != none:
                raise ValueError(
                    f"{name} is {getattr(config, name)!r} with align {cls.name}, expected "
                    f"--{name.replace('_', '-')} {none or repr(none)}: it aligns with no encoder"
                )
        if not 1 <= config.block_out_s < config.block_out_t:
            raise ValueError(
                f"block_out_s is {config.block_out_s} and block_out_t {config.block_out_t}, "
                "expected 1 <= block_out_s < block_out_t"
            )
        super().check(config)

    def expect_model(self, depth, tokens):
        """Raise ValueError unless the model has the teacher's block."""
        if self.teacher_depth > depth:
            raise ValueError(
                f"block_out_t is {self.teacher_depth}, expected at most the depth, {depth}"
            )

    def model_arguments(self):
        """Return the depth of the student's block, with SRA's head."""
        return {"encoder_depth": self.config.block_out_s, "z_dims": [], "self_align": True}

    def describe(self):
        """Return the EMA, and the two blocks."""
        return "its EMA", f"{self.config.block_out_s} with {self.teacher_depth}"

    def flops(self, tokens, width):
        """Return those of the head, and of the teacher up to its block."""
        teacher = transformer_flops(tokens=tokens, width=width, depth=self.teacher_depth)
        return 8 * tokens * width**2, teacher

    def targets(self, batch, clean, draws, objective, teacher):
        """Return the teacher's hidden states, with the same noise and the same dropped labels."""
        t = objective.earlier(draws.t, draws.offset, self.config.t_max)
        noisy, _ = objective.path.interpolate(clean, draws.noise, t)
        return [teacher.hidden(noisy, t, batch["label"], draws.drop, depth=self.teacher_depth)]

    def losses(self, projections, targets, world):
        """Return the distance of the head's output to the teacher's hidden states."""
        pairs = zip(projections, targets, strict=True)
        return [sra_loss(student, teacher, self.config.loss_type) for student, teacher in pairs]

    def weight(self, step):
        """Return also, with `--align-decay sra`, what the released code has."""
        config = self.config
        if config.align_decay != "sra":
            return super().weight(step)
        images = step * config.images_per_step
        return align_weight(config.loss_type, images, config.resolution, config.objective)


def align_weight(kind: str, images_seen: int, resolution: int, objective: str) -> float:
    """Return the weight of sra_loss in the total loss: the released constants and late decay.

    Cosines have 0.5 throughout, "cos-features" too, which the released code lacks. The other kinds
    have c 0.1^e, c = 2 for flow and 0.4 for DDPM, where e is 1 up to and with a knee epoch and
    grows linearly from there: at 256 x 256, and all others, after epoch 149 by 1 in 1000 epochs, at
    512 x 512 after epoch 99 by 1 in 800. The epoch is the index, from 0, of the running epoch of
    ImageNet: images_seen // 1,281,167 before this step, whatever the dataset. The released loader
    drops an epoch's last, incomplete batch, so its epochs are up to a batch shorter.

    Raises:
        ValueError: unknown kind or objective, or one that has no released weight.
    """
    expect_choice("kind", kind, KINDS)
    expect_choice("objective", objective, tuple(RELEASED))
    if objective == "ddpm" and kind != "sml1":
        raise ValueError(f"kind is {kind!r}, expected 'sml1': no other has a released DDPM weight")
    if kind in ("cos", "cos-features"):
        return 0.5
    knee, span = (99, 800) if resolution == 512 else (149, 1000)
    epoch = images_seen // IMAGENET_IMAGES
    exponent = 1 + max(0, epoch - knee) / span
    return RELEASED[objective] * 0.1**exponent
