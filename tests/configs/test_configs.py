"""The config of a training run: presets, what is saved, what is refused."""

import dataclasses
import itertools
import json
from functools import partial

import pytest

from repa_fast import objective
from repa_fast.configs import presets
from repa_fast.configs.align import AlignConfig
from repa_fast.configs.config import RETIRED, TrainConfig, from_saved
from repa_fast.configs.data import DataConfig
from repa_fast.configs.evaluate import EvaluateConfig
from repa_fast.configs.flags import parse_config
from repa_fast.configs.model import ModelConfig
from repa_fast.configs.objective import ObjectiveConfig
from repa_fast.configs.optim import OptimConfig
from repa_fast.configs.parallel import ParallelConfig
from repa_fast.configs.part import Part
from repa_fast.configs.precision import PrecisionConfig
from repa_fast.configs.run import RunConfig
from tests.refusals import refused

ENCODERS = ("mae-vit-l", "dinov1-vit-b", "mocov3-vit-l", "jepa-vit-h", "clip-vit-l")
PRESETS = [
    *("small", "pixels-32", "pixels-64"),
    *(f"digits{end}" for end in ("", "-sra", "-dit", "-dit-repa")),
    *(f"dit-{size}2{end}" for size in ("l", "xl") for end in ("", "-repa")),
    "dit-xl2-sra",
    *(f"sit-{size}2{end}" for size in ("s", "b", "l", "xl") for end in ("", "-repa")),
    *(f"sit-xl2-sra{end}" for end in ("", "-512", "-cos", "-cos-512")),
    *(f"sit-xl2-repa-lambda{weight}" for weight in ("0.25", "0.75", "1")),
    *(f"sit-l2-{name}-d8" for name in (*ENCODERS, "dinov2-vit-b", "dinov2-vit-g")),
    *(f"sit-l2-dinov2-vit-l-d{depth}" for depth in (6, 8, 10, 12, 14, 16)),
    "sit-l2-dinov2-vit-l-d8-cos",
]
"""Small runs, the digits, and the rows of the papers' tables."""


def test_the_presets_are_the_rows_of_the_papers_tables_and_survive_json():
    assert sorted(presets.PRESETS) == sorted(PRESETS)
    names = sorted(field.name for field in dataclasses.fields(TrainConfig))
    for name in PRESETS:
        config = presets.get(name)
        fields = json.loads(json.dumps(config.to_dict()))
        assert sorted(fields) == names
        assert from_saved(fields) == config and config.exp_name == name


@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_flag_resolves_to(name):
    pytest.importorskip("tyro")
    assert parse_config(["--preset", name]) == presets.get(name)


@pytest.mark.parametrize("size, depth", [("s", 4), ("b", 4), ("l", 8), ("xl", 8)])
def test_alignment_is_what_sets_repa_apart(size, depth):
    plain, repa = presets.get(f"sit-{size}2"), presets.get(f"sit-{size}2-repa")
    assert plain.model == repa.model == f"SiT-{size.upper()}/2"
    assert plain.enc_type == "none"
    assert (repa.enc_type, repa.encoder_depth, repa.proj_coeff) == ("dinov2-vit-b", depth, 0.5)
    alignment = {"exp_name": "", "enc_type": "none", "encoder_depth": 8}
    assert dataclasses.replace(plain, **alignment) == dataclasses.replace(repa, **alignment)


def test_a_config_of_an_earlier_version_loads_and_one_of_a_later_is_refused_by_what_it_adds():
    saved = TrainConfig(seed=3).to_dict() | {"cuda_graph": True, "gemm_epilogues": True}
    saved |= {"encoder_stream": False, "compile_mode": "max-autotune", "rollback": 2}
    saved |= {"vae_path": "a/b", "compute_copy": "optimizer", "joint_adaln": True}
    del saved["vae"]
    assert set(RETIRED) < saved.keys()
    expected = TrainConfig(seed=3, cuda_graph="on", stop_on_spike=True, vae="a/b")
    assert from_saved(saved) == expected
    assert not from_saved(saved | {"rollback": 0}).stop_on_spike
    assert from_saved(saved | {"cuda_graph": False}).cuda_graph == "off"
    assert from_saved({"seed": 3}) == TrainConfig(seed=3)
    later = TrainConfig().to_dict() | {"warp_drive": 9}
    refused(partial(from_saved, later), "a saved config has warp_drive, which is unknown here")


WRONG = {
    RunConfig: {
        "logging_dir": ("/logs", "a/../../b"),
        "exp_name": ("/x", "../y"),
        "log_every": (0,),
        "checkpointing_steps": (-1,),
        "keep_last": (-1,),
    },
    DataConfig: {"batch_size": (0,), "gradient_accumulation_steps": (0,), "num_workers": (0,)}
    | {"seed": (-1,), "micro_batch": (-2, 0)},
    ObjectiveConfig: {"cfg_prob": (-0.1, 1.1), "path_type": ("warp",), "weighting": ("warp",)},
    AlignConfig: {"projector": ("warp",)},
    OptimConfig: {"epochs": (0,), "max_train_steps": (0,), "max_bad_steps": (0,)}
    | {"ema_decay": ("-0.1", "0.9,1.0")},
    PrecisionConfig: {"mixed_precision": ("fp8",)},
    ParallelConfig: {"parallel": ("warp",)},
    EvaluateConfig: {"eval_every": (-1,), "eval_samples": (0,)},
}


@pytest.mark.parametrize("part", WRONG)
def test_a_part_refuses_what_cannot_run_and_so_does_the_whole(part):
    assert issubclass(part, Part) and issubclass(TrainConfig, part)
    for name, values in WRONG[part].items():
        for value, config in itertools.product(values, (part, TrainConfig)):
            refused(partial(config, **{name: value}), f"{name} is .*{value}.*expected")


@pytest.mark.parametrize("name, known", objective.choices().items())
def test_names_of_methods_are_checked_where_the_config_is_made(name, known):
    words = f"{name} is 'warp', expected one of {known[0]}"
    refused(lambda: TrainConfig(**{name: "warp"}), words)


def test_what_does_not_go_together_is_refused():
    assert ModelConfig(model="DiT-XL/2").model == "DiT-XL/2"
    ddpm = partial(TrainConfig, model="DiT-XL/2")  # whose objective is another
    refused(ddpm, "model is DiT-XL/2, expected --objective ddpm")
    spike = partial(TrainConfig, stop_on_spike=True)  # needs a checkpoint before the newest
    words = "keep_last is 1 with stop_on_spike, expected 0 or at lea"
    refused(partial(spike, keep_last=1), words)
    assert spike(keep_last=2).keep_last == 2
    column = partial(TrainConfig, align="sra", features="column")
    refused(column, "features is 'column' with align sra")


def test_a_config_accepts_the_ends_of_its_ranges_and_counts_accumulated_batches():
    for cfg_prob in (0.0, 1.0):
        ends = {"cfg_prob": cfg_prob, "ema_decay": "0.0,0.5", "micro_batch": 16}
        config = TrainConfig(batch_size=32, gradient_accumulation_steps=4, **ends)
        assert config.images_per_step == 128
