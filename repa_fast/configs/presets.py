"""Runs by name: `--preset NAME` starts from one, `repa-fast presets` lists them.

Figures to reach are the papers': 50,000 samples, without guidance unless said, after so many steps.
"""

import io
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from repa_fast.configs import file
from repa_fast.configs.config import TrainConfig
from repa_fast.contracts import expect_choice
from repa_fast.data.latents import can_decode
from repa_fast.data.open import Dataset, open_dataset
from repa_fast.data.store import is_url
from repa_fast.objective import build_alignment

FEW_IMAGES = 100_000
"""Up to so many are for the presets of small runs."""


@dataclass(frozen=True)
class Preset:
    """What a run is, the figure to reach, and its settings where they are not the defaults."""

    about: str
    to_reach: str
    settings: dict


PRESETS: dict[str, Preset] = {}


def add(name: str, about: str, to_reach: str = "-", **settings: object) -> None:
    """Enter a preset."""
    PRESETS[name] = Preset(about, to_reach, settings)


def get(name: str) -> TrainConfig:
    """Return the config of a preset; ValueError for an unknown name."""
    return TrainConfig(**values_of(name))


def values_of(name: str) -> dict:
    """Return the values of a preset that are not the defaults; ValueError for an unknown name."""
    expect_choice("preset", name, tuple(PRESETS))
    return {"exp_name": name, **PRESETS[name].settings}


def fitting(dataset: Dataset) -> str:
    """Return the preset for a dataset of at most FEW_IMAGES images; "" where there is none."""
    if len(dataset) > FEW_IMAGES:
        return ""
    if not can_decode(dataset.metadata):
        return "small"
    sides = ((32, "pixels-32"), (128, "pixels-64"), (sys.maxsize, ""))
    return next(name for side, name in sides if dataset.metadata.resolution <= side)


def proposal(data_dir: str) -> str:
    """Return the end of a message that proposes a preset for a dataset; "" where there is none."""
    with suppress(ValueError, OSError):  # what is wrong with it is said where it is opened
        if not is_url(data_dir) and Path(data_dir).exists():
            dataset = open_dataset(data_dir)
            if name := fitting(dataset):
                return f"; --preset {name} fits the {len(dataset)} images of {data_dir}"
    return ""


SMALL = {
    "enc_type": "none",
    "model": "SiT-S/2",
    "batch_size": 32,
    "epochs": 1_000_000,
    "max_train_steps": 20_000,
    "learning_rate": 5e-4,
    "warmup_steps": 200,
    "ema_decay": "0.999",
    "ema_warmup": True,
    "num_workers": 2,
    "log_every": 50,
    "sampling_steps": 1000,
    "checkpointing_steps": 1000,
    "keep_last": 3,
}
PIXELS = SMALL | {
    "model": "SiT-S/4",
    "hidden_size": 192,
    "depth": 6,
    "num_heads": 6,
    "batch_size": 16,
    "weighting": "lognormal",
    "learning_rate": 2e-3,
    "warmup_steps": 50,
    "max_train_steps": 2000,
    "ema_decay": "0.998",
    "log_every": 20,
    "sampling_steps": 500,
    "checkpointing_steps": 500,
    "num_steps": 25,
}
about = "Train a small SiT on latents of your own images, a few hundred to 100,000, on one GPU."
add("small", about, **SMALL)
about = "Train a tiny SiT on your own images of up to 32 pixels: minutes on two CPU cores."
add("pixels-32", about, **PIXELS)
about = "Train a tiny SiT on your own images of 64 pixels: minutes on two CPU cores."
add("pixels-64", about, **PIXELS | {"patch_size": 8, "hidden_size": 256, "num_heads": 8})


DIGITS = {
    "data_dir": "digits",
    "model": "SiT-S/4",
    "hidden_size": 128,
    "depth": 6,
    "num_heads": 4,
    "encoder_depth": 3,
    "projector_dim": 256,
    "enc_type": "digits-vit",
    "batch_size": 48,
    "num_workers": 1,
    "learning_rate": 2e-3,
    "ema_decay": "0.995",
    "max_train_steps": 1600,
    "log_every": 50,
    "sampling_steps": 400,
    "checkpointing_steps": 400,
    "cfg_scale": 2.5,
}
DIGITS_DIT = DIGITS | {
    # Which class a digit is of shows in steps where the error of the noise is small beside that of
    # other steps: uniform times and as many steps as the velocity needs leave it undecided.
    "objective": "ddpm",
    "model": "DiT-S/4",
    "weighting": "lognormal",
    "learning_rate": 3e-3,
    "lr_schedule": "cosine",
    "max_train_steps": 4000,
    "checkpointing_steps": 1000,
    "sampling_steps": 1000,
}
DIGITS_SRA = DIGITS | {"align": "sra", "enc_type": "none", "block_out_s": 2, "block_out_t": 4}
about = "Train a tiny aligned SiT on the bundled 16x16 digits: minutes on two CPU cores."
add("digits", about, **DIGITS)
about = "Train on the digits with SRA instead of an encoder: block 2 with block 4 of the EMA."
add("digits-sra", about, **DIGITS_SRA)
about = "Train on the digits with DiT's objective, or with DiT's and REPA's."
add("digits-dit", about, **DIGITS_DIT | {"enc_type": "none"})
add("digits-dit-repa", about, **DIGITS_DIT)

# REPA, appendix G: the 4th block for the base model, the 8th for large and xlarge. The paper has no
# S; here it is aligned as B. DINOv2-B, cosine and weight 0.5 are the defaults.
for size, depth, plain, aligned in (
    ("S", 4, "-", "-"),
    ("B", 4, "FID 33.0 (400K)", "FID 24.4 (400K)"),
    ("L", 8, "FID 18.8 (400K)", "FID 10.0 (400K)"),
    ("XL", 8, "FID 17.2 (400K), 8.3 (7M)", "FID 7.9 (400K), 5.9 (4M)"),
):
    name, model = f"sit-{size.lower()}2", f"SiT-{size}/2"
    recipe = "REPA's recipe (arXiv 2410.06940, appendix D)"
    about = f"Train {model} on ImageNet 256x256 with {recipe}."
    add(name, about, plain, model=model, enc_type="none")
    add(f"{name}-repa", about, aligned, model=model, encoder_depth=depth)

# DiT's chain of 1000 steps, its noise and variance; aligned as SiT.
for size, plain, aligned in (
    ("L", "FID 23.3 (400K)", "FID 15.6 (400K)"),
    ("XL", "FID 19.5 (400K), 9.6 (7M)", "FID 12.3 (400K), 9.6 (850K)"),
):
    name, dit = f"dit-{size.lower()}2", {"objective": "ddpm", "model": f"DiT-{size}/2"}
    about = f"Train {dit['model']} on ImageNet 256x256 (arXiv 2212.09748), in REPA's recipe."
    add(name, about, plain, **dit, enc_type="none")
    add(f"{name}-repa", about, aligned, **dit)

# SRA (arXiv 2505.02831): the paper's smooth L1 with the released weights, which decay; or the
# cosine over tokens, weight 0.5, that is the released code's default today.
SRA = {"align": "sra", "loss_type": "sml1", "align_decay": "sra"}
COSINE = {"align": "sra", "loss_type": "cos"}
about = "Train DiT-XL/2 with SRA at 256 pixels: block 8 with block 16 of the EMA, smooth L1."
add("dit-xl2-sra", about, objective="ddpm", model="DiT-XL/2", block_out_t=16, **SRA)
for name, resolution, to_reach, settings in (
    ("sit-xl2-sra", 256, "guided FID 1.58 (800 epochs)", SRA),
    ("sit-xl2-sra-512", 512, "guided FID 2.07 (400 epochs)", SRA),
    ("sit-xl2-sra-cos", 256, "-", COSINE),
    ("sit-xl2-sra-cos-512", 512, "-", COSINE),
):
    about = (
        f"Train SiT-XL/2 with SRA at {resolution} pixels (arXiv 2505.02831): block 8 with block 20 "
        "of the EMA."
    )
    add(name, about, to_reach, resolution=resolution, **settings)

# REPA's component table (table 2): encoder, depth, loss -> FID; and its ablation of the weight.
for encoder, depth, loss_type, fid in (
    ("mae-vit-l", 8, "nt-xent", "12.5"),
    ("dinov1-vit-b", 8, "nt-xent", "11.9"),
    ("mocov3-vit-l", 8, "nt-xent", "11.9"),
    ("jepa-vit-h", 8, "nt-xent", "11.6"),
    ("clip-vit-L", 8, "nt-xent", "11.0"),
    ("dinov2-vit-b", 8, "nt-xent", "9.7"),
    ("dinov2-vit-l", 8, "nt-xent", "10.0"),
    ("dinov2-vit-g", 8, "nt-xent", "9.8"),
    ("dinov2-vit-l", 6, "nt-xent", "10.3"),
    ("dinov2-vit-l", 10, "nt-xent", "10.5"),
    ("dinov2-vit-l", 12, "nt-xent", "11.2"),
    ("dinov2-vit-l", 14, "nt-xent", "11.6"),
    ("dinov2-vit-l", 16, "nt-xent", "12.1"),
    ("dinov2-vit-l", 8, "cos", "9.9"),
):
    add(
        f"sit-l2-{encoder.lower()}-d{depth}{'-cos' if loss_type == 'cos' else ''}",
        f"Train SiT-L/2 aligned with {encoder}, a row of REPA's component table (table 2).",
        f"FID {fid} (400K)",
        model="SiT-L/2",
        enc_type=encoder,
        encoder_depth=depth,
        loss_type=loss_type,
    )
for weight, fid in ((0.25, "8.6"), (0.75, "7.8"), (1.0, "7.8")):
    about = f"Train SiT-XL/2 with REPA and alignment weight {weight} (REPA's ablation of lambda)."
    add(f"sit-xl2-repa-lambda{weight:g}", about, f"FID {fid} (400K)", proj_coeff=weight)


@dataclass(kw_only=True)
class PresetsConfig:
    """List the presets, or one of them."""

    name: str = field(default="", metadata={"positional": True})
    """A preset; all where none is given."""
    yaml: bool = False
    """Print its settings as a file for `train.py --config`."""


def show(config: PresetsConfig) -> str:
    """Return the presets as a table, or one as a table or YAML."""
    if config.name:
        expect_choice("preset", config.name, tuple(PRESETS))
    if not config.yaml:
        return table({config.name: PRESETS[config.name]} if config.name else PRESETS)
    if not config.name:
        raise ValueError("yaml is set, expected the name of one preset before it")
    preset, use = PRESETS[config.name], "repa-fast train --config FILE --exp-name NAME"
    return file.write(preset.settings, f"{preset.about} {use}")


def table(found: dict[str, Preset]) -> str:
    """Return presets as a table, as wide as the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("preset", "model", "aligned with", "at block", "to reach", "what it is")
    for name, preset in found.items():
        config = get(name)
        model = config.model if config.hidden_size is None else f"width {config.hidden_size}"
        aligned = build_alignment(config).describe()
        table.add_row(name, model, *aligned, preset.to_reach, preset.about)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 140
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(table)
    return console.file.getvalue().rstrip("\n")
