"""The name of an .npz tells what decides its images; the official flags parse."""

import dataclasses
import re
import runpy

import pytest
import torch
import tyro

from repa_fast import cli
from repa_fast.configs.evaluate import EvaluateConfig
from repa_fast.configs.sampler import GUIDANCE, SamplerConfig
from repa_fast.eval import generate as generating
from repa_fast.eval.generate import GenerateConfig, name_of
from repa_fast.eval.load import load
from tests.eval import checkpoints


def test_another_checkpoint_is_another_file(make, run, loaded, whole, tmp_path):
    older = load(run / "checkpoints" / "0000003")
    name = name_of(make(tmp_path), older)
    assert whole.stem == name_of(make(tmp_path), loaded) != name
    assert "0000003" in name and "0000007" in whole.name


def test_other_weights_of_a_step_are_another_file_that_says_which(make, run, loaded, tmp_path):
    trained = load(run, weights="model")
    names = [name_of(make(tmp_path), one) for one in (trained, loaded)]
    heads = [name.rpartition("-")[0] for name in names]
    assert heads[0] == heads[1].replace("0000007", "0000007-model") != heads[1]
    described = generating.settings(make(tmp_path), trained)
    assert (described["weights"], described["digest"]) == ("model", trained.digest)
    assert trained.digest != loaded.digest


CHANGES = {
    "mode": "sde", "num_steps": 3, "heun": True, "adaptive": True, "cfg_scale": 1.50000001,
    "guidance_low": 0.1, "guidance_high": 0.9, "guidance_channels": 1, "path_type": "cosine",
    "prediction": "noise", "diffusion_form": "sigma", "diffusion_norm": 0.5, "last_step": "euler",
    "last_step_size": 0.05, "state_dtype": "fp32", "mixed_precision": "bf16", "tf32": False,
    "compile": True, "vae": "mse", "vae_precision": "bf16",
    "vae_tiled": True, "uint8": "round", "num_fid_samples": 21, "per_proc_batch_size": 7,
    "global_seed": 1, "labels": "balanced", "class_label": 0, "fused_attn": False,
}  # fmt: skip
SAME = {
    "pngs": True, "model": "SiT-S/4", "resolution": 16, "num_classes": 10, "encoder_depth": 3,
    "projector_embed_dims": "768,1024", "qk_norm": True, "legacy": True, "verify": False,
}  # fmt: skip
OTHERS = {"ckpt", "weights", "origin", "num_heads", "sample_dir"}
"""Of the weights, whose digest and heads are in the settings, and where the files are."""


@pytest.mark.parametrize("name", CHANGES)
def test_another_setting_has_another_name(make, loaded, tmp_path, name):
    """The finished file of other settings is never taken for that of these."""
    mode = {"mode": "sde"} if name.startswith(("diffusion", "last_")) else {}
    base, changed = make(tmp_path, **mode), make(tmp_path, **mode | {name: CHANGES[name]})
    if name.startswith("vae"):
        loaded = dataclasses.replace(loaded, metadata=checkpoints.LATENTS)
    assert name_of(base, loaded) != name_of(changed, loaded)


def test_the_autoencoder_s_short_name_and_default_are_its_name_and_torch_decides_nothing(
    make, loaded, tmp_path, monkeypatch
):
    latents = dataclasses.replace(loaded, metadata=checkpoints.LATENTS)
    names = {name_of(make(tmp_path, vae=v), latents) for v in ("", "ema", "sd-vae-ft-ema")}
    monkeypatch.setattr("torch.__version__", "0.0")
    assert names == {name_of(make(tmp_path), latents)}
    assert generating.settings(make(tmp_path), latents)["vae"] == "sd-vae-ft-ema"
    assert generating.settings(make(tmp_path, vae="mse"), loaded)["vae"] == "none"  # pixels


def test_every_other_setting_is_known_not_to_decide_the_images_and_finds_the_same_file(
    make, loaded, tmp_path
):
    known = [*CHANGES, *SAME, *OTHERS]
    assert sorted(known) == sorted(field.name for field in dataclasses.fields(GenerateConfig))
    base, changed = make(tmp_path), make(tmp_path, **SAME)
    assert name_of(base, loaded) == name_of(changed, loaded)
    assert generating.settings(base, loaded) == generating.settings(changed, loaded)


LONG = {name: value for name, value in CHANGES.items() if name not in ("heun", "adaptive")}


@pytest.mark.parametrize("stem", ["0400000", "x" * 200, "é" * 100])
def test_names_are_short_and_tell_heads_that_were_said(tmp_path, stem):
    torch.save(checkpoints.sit().state_dict(), tmp_path / f"{stem}.pt")
    two, four = (load(tmp_path / f"{stem}.pt", num_heads=heads) for heads in (2, 4))
    names = [name_of(GenerateConfig(ckpt="x", **LONG), two)] + [
        name_of(GenerateConfig(ckpt="x", **LONG | change), four)
        for change in ({}, {"num_fid_samples": 22}, {"last_step": "mean"}, {"uint8": "truncate"})
    ]
    assert len(set(names)) == len(names)
    assert all(len(f"{name}.npz") < 80 and "/" not in name for name in names)
    assert all(f"-{stem[:10]}" in name for name in names)


def test_the_name_of_the_papers_setting_is_read_by_people(loaded):
    plain = GenerateConfig(ckpt="x", mode="sde", num_steps=250, cfg_scale=1.8, guidance_high=0.7)
    loaded = dataclasses.replace(loaded, metadata=checkpoints.LATENTS, name="SiT-XL-2")
    name = name_of(plain, loaded)
    assert re.fullmatch(r"SiT-XL-2-0000007-sde-250-cfg-1\.8-n-50000-[0-9a-f]{8}", name)


OFFICIAL = [
    {"model": "SiT-XL/2", "num_fid_samples": 50_000, "path_type": "linear", "encoder_depth": 8,
     "projector_embed_dims": "768", "per_proc_batch_size": 64, "mode": "sde", "num_steps": 250,
     "cfg_scale": 1.8, "guidance_high": 0.7},
    {"mode": "ode", "projector_embed_dims": "768,1024", "cfg_scale": 4, "guidance_low": 0,
     "guidance_high": 1, "tf32": True, "global_seed": 3, "sample_dir": "there",
     "num_classes": 1000, "resolution": 256, "fused_attn": True, "qk_norm": True, "vae": "ema",
     "heun": True, "legacy": True},
    {"guidance_low": 0.1, "tf32": False, "resolution": 512, "fused_attn": False, "qk_norm": False,
     "vae": "mse", "heun": False, "legacy": False},
]  # fmt: skip
"""The flags of the official README's command, and others that generate.py has."""


@pytest.mark.parametrize("separator", [" ", "="])
@pytest.mark.parametrize("given", OFFICIAL)
def test_official_flags_parse(given, separator):
    line = "--ckpt x"
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            line += f" --{flag}" if value else f" --no-{flag}"
        else:
            line += f" --{flag}{separator}{value}"
    assert tyro.cli(GenerateConfig, args=line.split()) == GenerateConfig(ckpt="x", **given)


def test_defaults_are_the_official_ones():
    config = GenerateConfig(ckpt="x")
    expected = {
        "global_seed": 0, "tf32": True, "per_proc_batch_size": 32, "num_fid_samples": 50_000,
        "mode": "ode", "cfg_scale": 1.5,
        "num_steps": 50, "heun": False, "guidance_low": 0.0, "guidance_high": 1.0,
        "uint8": "truncate", "state_dtype": "fp64",
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert EvaluateConfig().cfg_scale == SamplerConfig().cfg_scale == GUIDANCE == 1.5


@pytest.mark.parametrize("argv, message", [
    (["--ckpt", "nowhere"], "nowhere does not exist"),
    (["--ckpt", "x", "--heun", "--adaptive"], "adaptive is for the ODE"),
    (["--ckpt", "x", "--num-step", "2"], "--num-step"),
    ([], "--ckpt"),
])  # fmt: skip
def test_user_errors_end_in_a_message(argv, message, capsys):
    try:
        status = cli.main(["generate", *argv])
    except SystemExit as stop:
        status = stop.code
    text = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert status == 2 and message in text and "Traceback" not in text


@pytest.mark.parametrize("argv, name", [
    ("generate --ckpt x --sample-dir s3://b/x", "sample_dir"),
    ("generate --ckpt gs://b/x", "ckpt"),
    ("sample --ckpt x --out s3://b/x.png", "out"),
    ("eval --samples x --dataset s3://b/x --write-reference s3://b/x.npz", "write_reference"),
    ("probe --ckpt x --data-dir s3://b/x --cache s3://b/x", "cache"),
    ("prepare digits --out s3://b/x", "out"),
    ("prepare images --data-dir x --out s3:/b/x", "out"),
    ("prepare import-official --out x --data-dir s3://b/x", "data_dir"),
    ("export x --out s3://b/x.pt", "out"),
    ("export s3://b/x", "checkpoint"),
])  # fmt: skip
def test_only_datasets_are_read_from_urls(argv, name, capsys, monkeypatch, tmp_path):
    """Also one of which pathlib has made s3:/bucket."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv.split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.match(rf"repa-fast: {name} is '(s3|gs)://?b/x\S*', expected a path: ", line)
    assert not any(tmp_path.iterdir())


def test_the_module_is_a_command_too(monkeypatch, capsys):
    """Which torchrun starts with -m."""
    monkeypatch.setattr("sys.argv", ["generate", "--ckpt", "nowhere"])
    with pytest.raises(SystemExit, match=r"^2$"):
        runpy.run_path(generating.__file__, run_name="__main__")
    assert "nowhere does not exist" in capsys.readouterr().err
