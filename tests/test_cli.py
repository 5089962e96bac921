"""The command line: presets, flags of the official train.py, errors that people read."""

import dataclasses
import json
import re

import pytest

from repa_fast import cli
from repa_fast.configs import presets
from repa_fast.configs.config import RETIRED, TrainConfig, from_saved
from repa_fast.configs.flags import parse_config

pytest.importorskip("tyro")

PRESETS = [
    "digits",
    "digits-sra",
    "digits-dit",
    "digits-dit-repa",
    *(f"dit-{size}2{end}" for size in ("l", "xl") for end in ("", "-repa")),
    "dit-xl2-sra",
    *(f"sit-{size}2{end}" for size in ("s", "b", "l", "xl") for end in ("", "-repa")),
    *(f"sit-xl2-sra{end}" for end in ("", "-512", "-cos", "-cos-512")),
    *(f"sit-xl2-repa-lambda{weight}" for weight in ("0.25", "0.75", "1")),
    *(
        f"sit-l2-{encoder}-d8"
        for encoder in (
            "mae-vit-l",
            "dinov1-vit-b",
            "mocov3-vit-l",
            "jepa-vit-h",
            "clip-vit-l",
            "dinov2-vit-b",
            "dinov2-vit-g",
        )
    ),
    *(f"sit-l2-dinov2-vit-l-d{depth}" for depth in (6, 8, 10, 12, 14, 16)),
    "sit-l2-dinov2-vit-l-d8-cos",
]
FIELDS = [field.name for field in dataclasses.fields(TrainConfig)]

# The flags of REPA's train.py, spelled as there.
OFFICIAL = [
    ("--output-dir", "out", "output_dir", "out"),
    ("--exp-name", "name", "exp_name", "name"),
    ("--logging-dir", "events", "logging_dir", "events"),
    ("--sampling-steps", "77", "sampling_steps", 77),
    ("--resume-step", "300", "resume_step", 300),
    ("--model", "SiT-B/2", "model", "SiT-B/2"),
    ("--num-classes", "12", "num_classes", 12),
    ("--encoder-depth", "4", "encoder_depth", 4),
    ("--fused-attn", None, "fused_attn", True),
    ("--no-fused-attn", None, "fused_attn", False),
    ("--qk-norm", None, "qk_norm", True),
    ("--no-qk-norm", None, "qk_norm", False),
    ("--data-dir", "somewhere", "data_dir", "somewhere"),
    ("--resolution", "512", "resolution", 512),
    ("--batch-size", "64", "batch_size", 64),
    ("--allow-tf32", None, "allow_tf32", True),
    ("--mixed-precision", "no", "mixed_precision", "no"),
    ("--mixed-precision", "fp16", "mixed_precision", "fp16"),
    ("--mixed-precision", "bf16", "mixed_precision", "bf16"),
    ("--epochs", "80", "epochs", 80),
    ("--max-train-steps", "1000", "max_train_steps", 1000),
    ("--checkpointing-steps", "250", "checkpointing_steps", 250),
    ("--gradient-accumulation-steps", "2", "gradient_accumulation_steps", 2),
    ("--learning-rate", "3e-4", "learning_rate", 3e-4),
    ("--adam-beta1", "0.8", "adam_beta1", 0.8),
    ("--adam-beta2", "0.95", "adam_beta2", 0.95),
    ("--adam-weight-decay", "0.01", "adam_weight_decay", 0.01),
    ("--adam-epsilon", "1e-6", "adam_epsilon", 1e-6),
    ("--max-grad-norm", "0.5", "max_grad_norm", 0.5),
    ("--seed", "3", "seed", 3),
    ("--num-workers", "9", "num_workers", 9),
    ("--path-type", "linear", "path_type", "linear"),
    ("--path-type", "cosine", "path_type", "cosine"),
    ("--prediction", "v", "prediction", "v"),
    ("--cfg-prob", "0.2", "cfg_prob", 0.2),
    ("--enc-type", "dinov2-vit-l", "enc_type", "dinov2-vit-l"),
    ("--enc-type", "dinov2-vit-b,dinov2reg-vit-b", "enc_type", "dinov2-vit-b,dinov2reg-vit-b"),
    ("--proj-coeff", "1.0", "proj_coeff", 1.0),
    ("--weighting", "lognormal", "weighting", "lognormal"),
]
OFFICIAL_DEFAULTS = {
    "output_dir": "exps",
    "logging_dir": "logs",
    "sampling_steps": 10_000,
    "resume_step": 0,
    "num_classes": 1000,
    "encoder_depth": 8,
    "fused_attn": True,
    "qk_norm": False,
    "data_dir": "../data/imagenet256",
    "resolution": 256,
    "batch_size": 256,
    "allow_tf32": False,
    "epochs": 1400,
    "max_train_steps": 400_000,
    "checkpointing_steps": 50_000,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-4,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 0.0,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "seed": 0,
    "num_workers": 4,
    "path_type": "linear",
    "prediction": "v",
    "cfg_prob": 0.1,
    "enc_type": "dinov2-vit-b",
    "proj_coeff": 0.5,
    "weighting": "uniform",
}
README_FLAGS = [
    "--report-to=wandb",
    "--allow-tf32",
    "--mixed-precision=fp16",
    "--seed=0",
    "--path-type=linear",
    "--prediction=v",
    "--weighting=uniform",
    "--model=SiT-XL/2",
    "--enc-type=dinov2-vit-b",
    "--proj-coeff=0.5",
    "--encoder-depth=8",
    "--output-dir=exps",
    "--exp-name=linear-dinov2-b-enc8",
]


def run(capsys, *argv: str) -> tuple[int, str]:
    """Exit status, and everything printed in one line without the frames around messages."""
    try:
        status = cli.main(argv)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    text = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", captured.out + captured.err)
    return status, " ".join(text.split())


def test_the_presets_are_the_rows_of_the_papers_tables():
    assert sorted(presets.PRESETS) == sorted(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_resolves(name):
    config = parse_config(["--preset", name])
    assert config == presets.get(name) and isinstance(config, TrainConfig)
    assert config.exp_name == name


@pytest.mark.parametrize("size, depth", [("s", 4), ("b", 4), ("l", 8), ("xl", 8)])
def test_alignment_is_what_sets_repa_apart(size, depth):
    plain, repa = presets.get(f"sit-{size}2"), presets.get(f"sit-{size}2-repa")
    assert plain.model == repa.model == f"SiT-{size.upper()}/2"
    assert plain.enc_type == "none"
    assert (repa.enc_type, repa.encoder_depth, repa.proj_coeff) == ("dinov2-vit-b", depth, 0.5)
    alignment = {"exp_name": "", "enc_type": "none", "encoder_depth": 8}
    assert dataclasses.replace(plain, **alignment) == dataclasses.replace(repa, **alignment)


def test_defaults_are_the_official_ones():
    config = TrainConfig()
    assert {name: getattr(config, name) for name in OFFICIAL_DEFAULTS} == OFFICIAL_DEFAULTS
    assert config.ema_decay == "0.9999" and config.ema_decays == (0.9999,)


@pytest.mark.parametrize(
    "argv", [["--preset", "digits", "--seed", "5"], ["--seed=5", "--preset=digits"]]
)
def test_flags_win_over_the_preset(argv):
    config = parse_config([*argv, "--batch-size", "24", "--hidden-size", "64"])
    expected = dataclasses.replace(presets.get("digits"), seed=5, batch_size=24, hidden_size=64)
    assert config == expected != presets.get("digits")


def test_a_preset_is_not_changed_by_flags():
    parse_config(["--preset", "digits", "--batch-size", "24"])
    assert parse_config(["--preset", "digits"]).batch_size == 48


@pytest.mark.parametrize("flag, value, name, expected", OFFICIAL)
def test_an_official_flag_parses(flag, value, name, expected):
    argv = ["--exp-name", "x"] if flag != "--exp-name" else []
    config = parse_config([*argv, flag, *([value] if value is not None else [])])
    assert getattr(config, name) == expected
    base = TrainConfig(exp_name="x")
    assert dataclasses.replace(config, **{name: getattr(base, name), "exp_name": "x"}) == base


def test_the_command_of_the_official_readme_parses():
    config = parse_config([*README_FLAGS, "--data-dir=/data", "--resolution=512"])
    assert config.exp_name == "linear-dinov2-b-enc8" and config.mixed_precision == "fp16"
    assert config.allow_tf32 and config.data_dir == "/data" and config.resolution == 512


@pytest.mark.parametrize(
    "argv, got, expected",
    [
        (["--preset", "sit-xxl"], "'sit-xxl'", "sit-xl2-repa"),
        (["--exp-name", "x", "--enc-type", "dino9"], "'dino9'", "dinov2-vit-b"),
        (["--exp-name", "x", "--enc-type", "dinov2-vit-b,dino9"], "'dino9'", "dinov2-vit-b"),
        (["--exp-name", "x", "--path-type", "warp"], "'warp'", "linear, cosine"),
        (["--exp-name", "x", "--weighting", "warp"], "'warp'", "uniform, lognormal"),
        (["--exp-name", "x", "--model", "SiT-Q/2"], "'SiT-Q/2'", "SiT-XL/2"),
        (["--exp-name", "x", "--mixed-precision", "fp8"], "'fp8'", "'bf16'"),
        (["--exp-name", "x", "--batch-size", "0"], "batch_size is 0", "at least 1"),
        (["--preset", "digits", "--resolution", "256"], "resolution is 256", "expected 16"),
        (["--preset", "digits", "--num-classes", "9"], "num_classes is 9", "at least 10"),
        (["--preset", "sit-b2-repa", "--encoder-depth", "13"], "encoder_depth is 13", "1..12"),
        (["--preset", "sit-b2-repa", "--model", "SiT-B/4"], "256 tokens", "expected 64"),
        (["--preset", "sit-b2-repa", "--resolution", "128"], "resolution is 128", "256, 512"),
    ],
)
def test_a_wrong_value_ends_in_a_message_with_expected_and_got(capsys, argv, got, expected):
    status, text = run(capsys, "train", *argv, "--dry-run")
    assert status == 2
    assert got in text and "expected" in text.lower()
    assert expected in text.lower() or expected in text
    assert "Traceback" not in text


def test_a_run_needs_a_name(capsys):
    status, text = run(capsys, "train", "--dry-run")
    assert status == 2 and "exp_name is empty" in text and "--exp-name" in text


def test_an_unknown_flag_is_named(capsys):
    status, text = run(capsys, "train", "--exp-name", "x", "--batch-sizes", "3")
    assert status == 2 and "--batch-sizes" in text


@pytest.mark.parametrize("argv, status", [([], 2), (["fly"], 2), (["-h"], 0), (["--help"], 0)])
def test_without_a_command_the_commands_are_listed(capsys, argv, status):
    got, text = run(capsys, *argv)
    assert got == status and "train" in text and "prepare" in text


def test_help_mentions_every_field(capsys):
    status, text = run(capsys, "train", "--help")
    assert status == 0 and "--preset" in text
    missing = [n for n in FIELDS if not re.search(rf"--{n.replace('_', '-')}(?![\w-])", text)]
    assert missing == []
    assert all(name in text for name in PRESETS)


def test_a_dry_run_prints_the_size_and_cost_of_xl(capsys, tmp_path):
    data = str(tmp_path / "absent")
    status, text = run(capsys, "train", "--preset", "sit-xl2-repa", "--data-dir", data, "--dry-run")
    assert status == 0
    assert "675 M" in text and "683 M" in text and "770.5 GFLOP" in text


def test_a_dry_run_prints_the_resolved_config_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["train", "--preset", "digits", "--batch-size", "24", "--dry-run"]
    assert cli.main(argv) == 0
    printed, _ = json.JSONDecoder().raw_decode(capsys.readouterr().out)
    expected = dataclasses.replace(presets.get("digits"), batch_size=24, dry_run=True)
    assert TrainConfig(**printed) == expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_json(name):
    config = presets.get(name)
    fields = json.loads(json.dumps(config.to_dict()))
    assert sorted(fields) == sorted(FIELDS)
    assert from_saved(fields) == config


def test_a_config_of_an_earlier_version_loads():
    saved = TrainConfig(seed=3).to_dict() | {"cuda_graph": True, "gemm_epilogues": True}
    saved |= {"encoder_stream": False, "compile_mode": "max-autotune"}
    saved |= {"rollback": 2}
    assert set(RETIRED) < saved.keys()
    assert from_saved(saved) == TrainConfig(seed=3, cuda_graph="on", stop_on_spike=True)
    assert not from_saved(saved | {"rollback": 0}).stop_on_spike
    assert from_saved(saved | {"cuda_graph": False}).cuda_graph == "off"
    assert from_saved({"seed": 3}) == TrainConfig(seed=3)


def test_a_config_of_a_later_version_is_refused_by_the_name_it_adds():
    with pytest.raises(ValueError, match="a saved config has warp_drive, which is unknown here"):
        from_saved(TrainConfig().to_dict() | {"warp_drive": 9})


def test_images_per_step_count_the_accumulated_batches():
    config = TrainConfig(batch_size=32, gradient_accumulation_steps=4)
    assert config.images_per_step == 128


@pytest.mark.parametrize(
    "name, value",
    [
        ("batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("log_every", 0),
        ("checkpointing_steps", -1),
        ("num_workers", 0),
        ("epochs", 0),
        ("max_train_steps", 0),
        ("max_bad_steps", 0),
        ("cfg_prob", -0.1),
        ("cfg_prob", 1.1),
        ("ema_decay", "-0.1"),
        ("ema_decay", "0.9,1.0"),
        ("seed", -1),
        ("keep_last", -1),
        ("eval_every", -1),
        ("micro_batch", -2),
        ("micro_batch", 0),
        ("mixed_precision", "fp8"),
        ("path_type", "warp"),
        ("weighting", "warp"),
    ],
)
def test_a_config_refuses_what_cannot_run(name, value):
    with pytest.raises(ValueError, match=rf"{name} is .*{value}.*expected"):
        TrainConfig(**{name: value})


def test_stopping_on_a_spike_needs_a_checkpoint_before_the_newest():
    with pytest.raises(ValueError, match="keep_last is 1 with stop_on_spike, expected 0 or at lea"):
        TrainConfig(stop_on_spike=True, keep_last=1)
    TrainConfig(stop_on_spike=True, keep_last=2)


@pytest.mark.parametrize(
    "name, value",
    [("cfg_prob", 0.0), ("cfg_prob", 1.0), ("ema_decay", "0.0,0.5"), ("micro_batch", 16)],
)
def test_a_config_accepts_the_ends_of_its_ranges(name, value):
    assert getattr(TrainConfig(**{name: value}), name) == value


def test_prepare_writes_the_digits_once(capsys, tmp_path):
    pytest.importorskip("lance")
    out = str(tmp_path / "digits")
    status, text = run(capsys, "prepare", "digits", "--out", out)
    assert status == 0 and out in text
    assert sorted(path.name for path in (tmp_path / "digits").iterdir()) == [
        "train.lance",
        "val.lance",
    ]
    status, text = run(capsys, "prepare", "digits", "--out", out)
    assert status == 2 and "exists already" in text


def test_prepare_refuses_an_unknown_source(capsys):
    status, text = run(capsys, "prepare", "cifar")
    assert status == 2 and "'cifar'" in text and "digits" in text
