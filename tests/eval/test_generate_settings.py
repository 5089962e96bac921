"""The name of an .npz holds what decides its images; the official flags parse."""

import dataclasses
import functools
import shutil

import pytest
import torch
import tyro

from repa_fast import cli
from repa_fast.eval import generate as generating
from repa_fast.eval.generate import GenerateConfig, generate, name_of
from repa_fast.eval.load import load
from tests.eval import checkpoints
from tests.eval.generating import arguments, assert_same, config_of


@pytest.fixture(autouse=True)
def same_precision():
    with checkpoints.precision_kept():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return checkpoints.run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def loaded(run):
    return load(run)


@pytest.fixture(scope="module")
def make(run):
    """(folder, settings) -> config."""
    return functools.partial(config_of, run)


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory):
    """Made at once by one process."""
    return generate(make(tmp_path_factory.mktemp("whole")))


def test_another_checkpoint_is_another_file(make, whole, tmp_path):
    other = checkpoints.run(tmp_path / "run", steps=(8,))
    out = generate(make(tmp_path / "out", ckpt=str(other)))
    assert out.name != whole.name and "0000008" in out.name and "0000007" in whole.name
    assert load(other).digest in out.name


CHANGES = {
    "mode": "sde",
    "num_steps": 3,
    "heun": True,
    "adaptive": True,
    "cfg_scale": 1.50000001,
    "guidance_low": 0.1,
    "guidance_high": 0.9,
    "guidance_channels": 1,
    "path_type": "cosine",
    "prediction": "noise",
    "diffusion_form": "sigma",
    "diffusion_norm": 0.5,
    "last_step": "euler",
    "last_step_size": 0.05,
    "state_dtype": "fp32",
    "mixed_precision": "bf16",
    "tf32": False,
    "compile": True,
    "vae": "mse",
    "vae_path": "/another/ema",
    "vae_precision": "bf16",
    "vae_tiled": True,
    "uint8": "round",
    "num_fid_samples": 21,
    "per_proc_batch_size": 7,
    "global_seed": 1,
    "labels": "balanced",
    "class_label": 0,
    "fused_attn": False,
}
SAME = {
    "ckpt": None,  # the digest of its weights is in the name
    "sample_dir": None,
    "origin": None,  # what it does to the weights is in their digest
    "num_heads": None,  # see test_heads_that_were_said_are_in_the_name
    "pngs": True,
    "model": "SiT-S/4",
    "resolution": 16,
    "num_classes": 10,
    "encoder_depth": 3,
    "projector_embed_dims": "768,1024",
    "qk_norm": True,
    "legacy": True,
}


def test_every_setting_is_known_to_decide_the_images_or_not_to():
    assert CHANGES.keys() | SAME.keys() == {f.name for f in dataclasses.fields(GenerateConfig)}
    assert not CHANGES.keys() & SAME.keys()


@pytest.mark.parametrize("name", CHANGES)
def test_another_setting_has_another_name_or_is_refused(make, loaded, tmp_path, name):
    """The finished file of other settings is never taken for that of these."""
    mode = {"mode": "sde"} if name.startswith(("diffusion", "last_")) else {}
    base, changed = make(tmp_path, **mode), make(tmp_path, **mode | {name: CHANGES[name]})
    if name.startswith("vae"):
        loaded = dataclasses.replace(loaded, metadata=checkpoints.LATENTS)
    if name_of(base, loaded) != name_of(changed, loaded):
        return
    settings = (generating.settings(config, loaded) for config in (base, changed))
    assert name in ("cfg_scale", "vae_path") and next(settings) != next(settings)


def test_a_finished_file_of_other_settings_is_not_taken_for_theirs(make, whole, tmp_path):
    for path in whole.parent.iterdir():
        shutil.copy2(path, tmp_path)
    with pytest.raises(ValueError, match=r"cfg_scale: 1\.5, now 1\.50000001.*--sample-dir"):
        generate(make(tmp_path, cfg_scale=1.50000001))


@pytest.mark.parametrize("name", [name for name, value in SAME.items() if value is not None])
def test_settings_that_do_not_decide_the_images_find_the_same_file(make, loaded, tmp_path, name):
    base, changed = make(tmp_path), make(tmp_path, **{name: SAME[name]})
    assert name_of(base, loaded) == name_of(changed, loaded)
    assert generating.settings(base, loaded) == generating.settings(changed, loaded)


def test_heads_that_were_said_are_in_the_name(make, tmp_path):
    torch.save(checkpoints.sit().state_dict(), tmp_path / "x.pt")
    names = {name_of(make(tmp_path), load(tmp_path / "x.pt", num_heads=n)) for n in (2, 4, 8)}
    assert len(names) == 3


LONG = {
    "mode": "sde",
    "num_steps": 1000,
    "cfg_scale": 1.23457,
    "guidance_low": 0.123456,
    "guidance_high": 0.765432,
    "guidance_channels": 3,
    "path_type": "linear",
    "prediction": "score",
    "diffusion_form": "increasing-decreasing",
    "last_step": "tweedie",
    "last_step_size": 0.0123456,
    "mixed_precision": "bf16",
    "vae_path": "/some/where/sd-vae-ft-mse-original",
    "labels": "balanced",
    "num_fid_samples": 50_000,
}


@pytest.mark.parametrize("stem", ["0400000", "x" * 200, "é" * 100])
def test_names_are_short_enough_for_every_file_system(tmp_path, stem):
    torch.save(checkpoints.sit().state_dict(), tmp_path / f"{stem}.pt")
    loaded = load(tmp_path / f"{stem}.pt", num_heads=4)
    names = [
        name_of(GenerateConfig(ckpt="x", **LONG | change), loaded)
        for change in ({}, {"num_fid_samples": 50_001}, {"last_step": "mean"}, {"uint8": "round"})
    ]
    assert len(set(names)) == len(names)
    assert all(len(f"{name}.npz".encode()) < 200 and "/" not in name for name in names)


def test_the_name_of_the_papers_setting_is_read_by_people(loaded):
    plain = GenerateConfig(ckpt="x", mode="sde", num_steps=250, cfg_scale=1.8, guidance_high=0.7)
    loaded = dataclasses.replace(loaded, metadata=checkpoints.LATENTS, name="SiT-XL-2")
    name = name_of(plain, loaded)
    parts = ("SiT-XL-2", "0000007", loaded.digest, "sde-250", "cfg-1.8", "interval-0-0.7",
             "random", "seed-0", "batch-32", "n-50000")  # fmt: skip
    assert [part for part in parts if f"-{part}-" not in f"-{name}-"] == []


OFFICIAL = [
    ("--model", "SiT-XL/2", "model", "SiT-XL/2"),
    ("--num-fid-samples", "50000", "num_fid_samples", 50_000),
    ("--path-type", "linear", "path_type", "linear"),
    ("--encoder-depth", "8", "encoder_depth", 8),
    ("--projector-embed-dims", "768", "projector_embed_dims", "768"),
    ("--projector-embed-dims", "768,1024", "projector_embed_dims", "768,1024"),
    ("--per-proc-batch-size", "64", "per_proc_batch_size", 64),
    ("--mode", "sde", "mode", "sde"),
    ("--mode", "ode", "mode", "ode"),
    ("--num-steps", "250", "num_steps", 250),
    ("--cfg-scale", "1.8", "cfg_scale", 1.8),
    ("--cfg-scale", "4", "cfg_scale", 4.0),
    ("--guidance-low", "0", "guidance_low", 0.0),
    ("--guidance-low", "0.1", "guidance_low", 0.1),
    ("--guidance-high", "0.7", "guidance_high", 0.7),
    ("--guidance-high", "1", "guidance_high", 1.0),
    ("--tf32", None, "tf32", True),
    ("--no-tf32", None, "tf32", False),
    ("--global-seed", "3", "global_seed", 3),
    ("--sample-dir", "there", "sample_dir", "there"),
    ("--num-classes", "1000", "num_classes", 1000),
    ("--resolution", "256", "resolution", 256),
    ("--resolution", "512", "resolution", 512),
    ("--fused-attn", None, "fused_attn", True),
    ("--no-fused-attn", None, "fused_attn", False),
    ("--qk-norm", None, "qk_norm", True),
    ("--no-qk-norm", None, "qk_norm", False),
    ("--vae", "ema", "vae", "ema"),
    ("--vae", "mse", "vae", "mse"),
    ("--heun", None, "heun", True),
    ("--no-heun", None, "heun", False),
    ("--legacy", None, "legacy", True),
    ("--no-legacy", None, "legacy", False),
]
README = (
    "--model SiT-XL/2 --num-fid-samples 50000 --ckpt X --path-type=linear --encoder-depth=8 "
    "--projector-embed-dims=768 --per-proc-batch-size=64 --mode=sde --num-steps=250 "
    "--cfg-scale=1.8 --guidance-high=0.7"
)


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("flag, value, name, expected", OFFICIAL)
def test_an_official_flag_parses(flag, value, name, expected, separate):
    words = [flag] if value is None else [flag, value] if separate else [f"{flag}={value}"]
    config = tyro.cli(GenerateConfig, args=["--ckpt", "x", *words])
    assert getattr(config, name) == expected
    base = GenerateConfig(ckpt="x")
    assert dataclasses.replace(config, **{name: getattr(base, name)}) == base


def test_the_command_of_the_official_readme_parses():
    config = tyro.cli(GenerateConfig, args=README.split())
    assert config == GenerateConfig(
        ckpt="X", model="SiT-XL/2", num_fid_samples=50_000, path_type="linear", encoder_depth=8,
        projector_embed_dims="768", per_proc_batch_size=64, mode="sde", num_steps=250,
        cfg_scale=1.8, guidance_high=0.7,
    )  # fmt: skip


def test_defaults_are_the_official_ones():
    config = GenerateConfig(ckpt="x")
    expected = {
        "global_seed": 0, "tf32": True, "sample_dir": "samples", "vae": "ema",
        "per_proc_batch_size": 32, "num_fid_samples": 50_000, "mode": "ode", "cfg_scale": 1.5,
        "num_steps": 50, "heun": False, "guidance_low": 0.0, "guidance_high": 1.0,
        "uint8": "truncate", "state_dtype": "fp64",
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


def test_the_command_says_where_the_file_is(make, whole, tmp_path, capsys):
    assert cli.main(["generate", *arguments(make(tmp_path))]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / whole.name)
    assert_same(tmp_path / whole.name, whole)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--ckpt", "nowhere"], "nowhere does not exist"),
        (["--ckpt", "x", "--heun", "--adaptive"], "adaptive is for the ODE"),
        (["--ckpt", "x", "--guidance-low", "2"], "guidance_low is 2"),
        (["--ckpt", "x", "--num-step", "2"], "--num-step"),
        (["--ckpt", "x", "--mode", "warp"], "warp"),
        ([], "--ckpt"),
    ],
)
def test_user_errors_end_in_a_message(argv, message, capsys):
    try:
        status = cli.main(["generate", *argv])
    except SystemExit as stop:
        status = stop.code
    text = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert status == 2 and message in text and "Traceback" not in text
