"""A run is a function that returns a TrainConfig; `--preset NAME` names one of these."""

import dataclasses
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from functools import partial

from repa_fast.configs.config import TrainConfig
from repa_fast.contracts import expect_choice
from repa_fast.objective import build_alignment

ALIGNMENT_DEPTH = {"S": 4, "B": 4, "L": 8, "XL": 8}
"""REPA, Appendix G: the 4th block for the base model, the 8th for large and xlarge. The paper has
no S; here it is aligned as B."""


def digits() -> TrainConfig:
    """Train a tiny aligned SiT on the bundled 16x16 digits: minutes on two CPU cores."""
    return TrainConfig(
        exp_name="digits",
        data_dir="digits",
        resolution=16,
        num_classes=10,
        model="SiT-S/4",
        hidden_size=128,
        depth=6,
        num_heads=4,
        encoder_depth=3,
        projector_dim=256,
        enc_type="digits-vit",
        batch_size=48,
        num_workers=1,
        learning_rate=2e-3,
        ema_decay="0.995",
        max_train_steps=1600,
        log_every=50,
        sampling_steps=400,
        checkpointing_steps=400,
        cfg_scale=2.5,
    )


def sit(size: str, *, repa: bool) -> TrainConfig:
    """Train SiT-{0}/2 on ImageNet 256x256 with REPA's recipe (arXiv 2410.06940, appendix D).

    With alignment: DINOv2-B, cosine, weight 0.5, at the depth of appendix G.
    """
    name = f"sit-{size.lower()}2"
    config = TrainConfig(exp_name=name, model=f"SiT-{size}/2", enc_type="none")
    if repa:
        config.exp_name = f"{name}-repa"
        config.enc_type = "dinov2-vit-b"
        config.encoder_depth = ALIGNMENT_DEPTH[size]
    return config


def dit(size: str, *, repa: bool) -> TrainConfig:
    """Train DiT-{0}/2 on ImageNet 256x256 (arXiv 2212.09748), in REPA's recipe.

    Noise and variance of a chain of 1000 steps; with alignment: DINOv2-B, cosine, weight 0.5, at
    block 8.
    """
    config = sit(size, repa=repa)
    config.objective, config.model = "ddpm", f"DiT-{size}/2"
    config.exp_name = config.exp_name.replace("sit", "dit")
    return config


def component(encoder: str, *, depth: int = 8, loss_type: str = "nt-xent") -> TrainConfig:
    """Train SiT-L/2 aligned with {0}, a row of REPA's component table (table 2)."""
    config = sit("L", repa=True)
    config.enc_type, config.encoder_depth, config.loss_type = encoder, depth, loss_type
    config.exp_name = f"sit-l2-{encoder.lower()}-d{depth}{'-cos' if loss_type == 'cos' else ''}"
    return config


def weighted(coefficient: float) -> TrainConfig:
    """Train SiT-XL/2 with REPA and alignment weight {0} (REPA's ablation of lambda)."""
    config = sit("XL", repa=True)
    config.proj_coeff = coefficient
    config.exp_name = f"sit-xl2-repa-lambda{coefficient:g}"
    return config


def sra(resolution: int, *, cosine: bool = False) -> TrainConfig:
    """Train SiT-XL/2 with SRA at {0} pixels (arXiv 2505.02831): block 8 with block 20 of the EMA.

    The paper's smooth L1 with the released weights, which decay; or the cosine over tokens, weight
    0.5, that is the released code's default today.
    """
    return TrainConfig(
        exp_name=f"sit-xl2-sra{'-cos' if cosine else ''}{'-512' if resolution == 512 else ''}",
        model="SiT-XL/2",
        resolution=resolution,
        align="sra",
        loss_type="cos" if cosine else "sml1",
        align_decay="constant" if cosine else "sra",
        block_out_s=8,
        block_out_t=20,
    )


def dit_sra() -> TrainConfig:
    """Train DiT-XL/2 with SRA at 256 pixels: block 8 with block 16 of the EMA, smooth L1."""
    config = sra(256)
    return dataclasses.replace(
        config, exp_name="dit-xl2-sra", objective="ddpm", model="DiT-XL/2", block_out_t=16
    )


def digits_dit(*, repa: bool) -> TrainConfig:
    """Train on the digits with DiT's objective, or with DiT's and REPA's.

    Which class a digit is of shows in steps where the error of the noise is small beside that of
    other steps: uniform times and as many steps as the velocity needs leave it undecided.
    """
    return dataclasses.replace(
        digits(),
        exp_name="digits-dit-repa" if repa else "digits-dit",
        objective="ddpm",
        model="DiT-S/4",
        enc_type="digits-vit" if repa else "none",
        weighting="lognormal",
        learning_rate=3e-3,
        lr_schedule="cosine",
        max_train_steps=4000,
        checkpointing_steps=1000,
        sampling_steps=1000,
    )


def digits_sra() -> TrainConfig:
    """Train on the digits with SRA instead of an encoder: block 2 with block 4 of the EMA."""
    config = digits()
    return dataclasses.replace(
        config, exp_name="digits-sra", align="sra", enc_type=None, block_out_s=2, block_out_t=4
    )


COMPONENTS = {
    ("mae-vit-l", 8): 12.5,
    ("dinov1-vit-b", 8): 11.9,
    ("mocov3-vit-l", 8): 11.9,
    ("jepa-vit-h", 8): 11.6,
    ("clip-vit-L", 8): 11.0,
    ("dinov2-vit-b", 8): 9.7,
    ("dinov2-vit-l", 8): 10.0,
    ("dinov2-vit-g", 8): 9.8,
    ("dinov2-vit-l", 6): 10.3,
    ("dinov2-vit-l", 10): 10.5,
    ("dinov2-vit-l", 12): 11.2,
    ("dinov2-vit-l", 14): 11.6,
    ("dinov2-vit-l", 16): 12.1,
}
"""(encoder, depth) -> FID after 400K steps with NT-Xent."""
LAMBDAS = {0.25: 8.6, 0.75: 7.8, 1.0: 7.8}
"""Weight of the alignment -> FID of SiT-XL/2 after 400K steps; 0.5 is sit-xl2-repa."""

PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "digits": digits,
    "digits-sra": digits_sra,
    "digits-dit": partial(digits_dit, repa=False),
    "digits-dit-repa": partial(digits_dit, repa=True),
    **{f"sit-{size.lower()}2": partial(sit, size, repa=False) for size in ALIGNMENT_DEPTH},
    **{f"sit-{size.lower()}2-repa": partial(sit, size, repa=True) for size in ALIGNMENT_DEPTH},
    **{f"dit-{size.lower()}2": partial(dit, size, repa=False) for size in ("L", "XL")},
    **{f"dit-{size.lower()}2-repa": partial(dit, size, repa=True) for size in ("L", "XL")},
    "dit-xl2-sra": dit_sra,
    "sit-xl2-sra": partial(sra, 256),
    "sit-xl2-sra-512": partial(sra, 512),
    "sit-xl2-sra-cos": partial(sra, 256, cosine=True),
    "sit-xl2-sra-cos-512": partial(sra, 512, cosine=True),
    **{
        f"sit-l2-{encoder.lower()}-d{depth}": partial(component, encoder, depth=depth)
        for encoder, depth in COMPONENTS
    },
    "sit-l2-dinov2-vit-l-d8-cos": partial(component, "dinov2-vit-l", loss_type="cos"),
    **{f"sit-xl2-repa-lambda{value:g}": partial(weighted, value) for value in LAMBDAS},
}

TO_REACH = {
    "sit-b2": "FID 33.0 (400K)",
    "sit-b2-repa": "FID 24.4 (400K)",
    "sit-l2": "FID 18.8 (400K)",
    "sit-l2-repa": "FID 10.0 (400K)",
    "sit-xl2": "FID 17.2 (400K), 8.3 (7M)",
    "sit-xl2-repa": "FID 7.9 (400K), 5.9 (4M)",
    "sit-l2-dinov2-vit-l-d8-cos": "FID 9.9 (400K)",
    "dit-l2": "FID 23.3 (400K)",
    "dit-l2-repa": "FID 15.6 (400K)",
    "dit-xl2": "FID 19.5 (400K), 9.6 (7M)",
    "dit-xl2-repa": "FID 12.3 (400K), 9.6 (850K)",
    **{
        f"sit-l2-{encoder.lower()}-d{depth}": f"FID {fid} (400K)"
        for (encoder, depth), fid in COMPONENTS.items()
    },
    **{f"sit-xl2-repa-lambda{value:g}": f"FID {fid} (400K)" for value, fid in LAMBDAS.items()},
    "sit-xl2-sra": "guided FID 1.58 (800 epochs)",
    "sit-xl2-sra-512": "guided FID 2.07 (400 epochs)",
}
"""The papers' figures: 50,000 samples, without guidance unless said, after so many steps."""


def main(argv: Sequence[str]) -> None:
    """Print the presets as a table."""
    from rich.console import Console
    from rich.table import Table

    ArgumentParser(prog="repa-fast presets", description=main.__doc__).parse_args(argv)
    table = Table("preset", "model", "aligned with", "at block", "to reach", "what it is")
    for name, preset in PRESETS.items():
        config = preset()
        model = config.model if config.hidden_size is None else f"width {config.hidden_size}"
        aligned = build_alignment(config).describe()
        table.add_row(name, model, *aligned, TO_REACH.get(name, "-"), describe(name))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def describe(name: str) -> str:
    """Return the first line of a preset's docstring, with its first argument filled in."""
    function = PRESETS[name]
    arguments = getattr(function, "args", ())
    text = (getattr(function, "func", function).__doc__ or "").splitlines()[0]
    return text.format(*arguments)


def get(name: str) -> TrainConfig:
    """Return the config of a preset; ValueError for an unknown name."""
    expect_choice("preset", name, tuple(PRESETS))
    return PRESETS[name]()
