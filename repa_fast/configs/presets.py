"""A run is a function that returns a TrainConfig; `--preset NAME` names one of these."""

from collections.abc import Callable
from functools import partial

from repa_fast.configs.config import TrainConfig
from repa_fast.contracts import expect_choice

ALIGNMENT_DEPTH = {"S": 4, "B": 4, "L": 8, "XL": 8}
"""REPA, Appendix G: the 4th block for the base model, the 8th for large and xlarge. The paper has
no S; here it is aligned as B."""


def digits() -> TrainConfig:
    """Bundled 16x16 digits in pixel space with a tiny aligned SiT: minutes on two CPU cores."""
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
    """SiT-{size}/2 on ImageNet 256x256 with REPA's recipe (arXiv 2410.06940, appendix D).

    With alignment: DINOv2-B, cosine, weight 0.5, at the depth of appendix G.
    """
    name = f"sit-{size.lower()}2"
    config = TrainConfig(exp_name=name, model=f"SiT-{size}/2", enc_type="none")
    if repa:
        config.exp_name = f"{name}-repa"
        config.enc_type = "dinov2-vit-b"
        config.encoder_depth = ALIGNMENT_DEPTH[size]
    return config


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "digits": digits,
    **{f"sit-{size.lower()}2": partial(sit, size, repa=False) for size in ALIGNMENT_DEPTH},
    **{f"sit-{size.lower()}2-repa": partial(sit, size, repa=True) for size in ALIGNMENT_DEPTH},
}


def describe(name: str) -> str:
    """The first sentence of a preset's docstring, with its size filled in."""
    function = PRESETS[name]
    arguments = getattr(function, "args", ())
    text = (getattr(function, "func", function).__doc__ or "").splitlines()[0]
    return text.format(size=arguments[0]) if arguments else text


def get(name: str) -> TrainConfig:
    """The config of a preset; ValueError for an unknown name."""
    expect_choice("preset", name, tuple(PRESETS))
    return PRESETS[name]()
