"""The card says what the run says: figures with their commands, and nothing of the machine."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from repa_fast import command
from repa_fast.configs import file, flags
from repa_fast.configs.config import TrainConfig
from repa_fast.eval.generate import GenerateConfig, generate
from repa_fast.eval.metrics import EvalConfig
from repa_fast.objective import OBJECTIVES
from repa_fast.share import card
from repa_fast.share.pretrained import load
from tests.eval import checkpoints

KINDS = ("report_to", "logging_dir", "enc_weights")
"""Of the private settings, those that take no path as it comes."""


def scored(run, **settings):
    """Images of a run and, as `repa-fast eval` writes them, scores of them."""
    size = {"num_fid_samples": 4, "num_steps": 2, "per_proc_batch_size": 4}
    images = generate(GenerateConfig(ckpt=str(run), **size | settings))
    config = EvalConfig(samples=str(run), dataset="/home/me/data/mine", features="fitted")
    samples = {"name": f"{images.name}, sha256 0123456789abcdef", "count": 4}
    values = {"scores": {"Frechet distance": 12.34567, "KID": 0.5}, "samples": samples}
    values |= {"settings": dataclasses.asdict(config)}
    images.with_name("scores-of-mine.json").write_text(json.dumps(values))
    return images


def front_matter(text):
    head, body = text.removeprefix("---\n").split("\n---\n")
    return yaml.safe_load(head), body


def test_the_card_has_what_the_run_says_and_commands_that_make_the_images(tmp_path, monkeypatch):
    run = checkpoints.run(tmp_path / "run", steps=(3, 7), data_dir="/home/me/data/mine", seed=4)
    (run / "samples.png").write_bytes(b"a picture")
    images = scored(run, cfg_scale=2.5, mode="sde", num_steps=3)
    loaded = load(run)
    folder = loaded.save_pretrained(tmp_path / "out", "me/tiny")
    head, body = front_matter((folder / "README.md").read_text())
    assert head["library_name"] == "repa-fast" and "license" not in head
    assert body.startswith("\n# tiny\n")
    count = sum(p.numel() for p in loaded.model.parameters())
    assert f"SiT with {count / 1e6:.1f} M parameters" in body
    assert "16x16 pixels in 10 classes" in body and "Weights: ema of step 7." in body
    assert 'SiTPipeline.from_pretrained("me/tiny")' in body
    assert "| aligned with | digits-vit, at block 2 |\n| steps | 7 |" in body
    assert "| seed | 4 |" in body and "2410.06940" in body
    assert "![samples](samples.png)" in body
    assert (folder / "samples.png").read_bytes() == b"a picture"
    assert "| Frechet distance | 12.346 |\n| KID | 0.5 |" in body
    commands = re.search(r"```\n(repa-fast generate.*?)\n```", body, re.S)[1].splitlines()
    assert commands == [
        "repa-fast generate --ckpt me/tiny --sample-dir samples --mode=sde --num-steps=3 "
        "--cfg-scale=2.5 --num-fid-samples=4 --per-proc-batch-size=4",
        f"repa-fast eval --samples samples/{images.name} --dataset=mine --features=fitted",
    ]
    words = [str(folder) if word == "me/tiny" else word for word in commands[0].split()[2:]]
    monkeypatch.chdir(tmp_path)
    again = generate(command.parse(GenerateConfig, words, "generate"))
    assert again.name == images.name
    with np.load(again) as ours, np.load(images) as theirs:
        assert (ours["arr_0"] == theirs["arr_0"]).all()
    assert "/home" not in body and str(tmp_path) not in body


def test_the_settings_make_the_same_training(tmp_path):
    run = checkpoints.run(tmp_path / "run", data_dir="/home/me/data", learning_rate=3e-4)
    folder = load(run).save_pretrained(tmp_path / "out")
    text = (folder / card.TRAINING).read_text()
    assert "/home" not in text
    kept = file.read(folder / card.TRAINING)
    again = flags.parse_config(["--config", str(folder / card.TRAINING), "--exp-name", "x"])
    settings = card.settings_of(load(run)).config.to_dict()
    private = {*card.PRIVATE, *file.OF_ONE_RUN}
    differing = {n for n, value in settings.items() if again.to_dict()[n] != value}
    assert kept["learning_rate"] == 3e-4 and differing <= private


def test_figures_of_other_weights_are_left_out_and_odd_files_do_no_harm(tmp_path):
    run = checkpoints.run(tmp_path / "run", ema_decay="0.9,0.5")
    scored(run, weights="ema_2")
    folder = run / "generated"
    (folder / "odd.json").write_text(json.dumps({"scores": "none"}))
    assert "## Figures" not in card.model_card(load(run), "me/x", tmp_path)
    text = card.model_card(load(run, weights="ema_2"), "me/x", tmp_path)
    assert "12.346" in text and "Weights: ema_2 of step 7." in text
    record = folder / "scores-of-mine.json"
    good = json.loads(record.read_text())
    for bad in (
        "{",
        json.dumps(good | {"scores": {"FID": 10**400}}),
        json.dumps(good | {"settings": {"batch_size": "many"}}),
        json.dumps(good | {"samples": {"name": good["samples"]["name"], "count": None}}),
        json.dumps(good | {"samples": {"name": "../../x.npz", "count": 4}}),
    ):
        record.write_text(bad)
        text = card.model_card(load(run, weights="ema_2"), "me/x", tmp_path)
        assert "## Figures" not in text
    record.write_text(json.dumps(good | {"scores": {"a | <b>": 1}}))
    assert r"| a \| \<b\> | 1 |" in card.model_card(load(run, weights="ema_2"), "me/x", tmp_path)


def test_nothing_private_is_in_any_file(tmp_path):
    vae = tmp_path / "my-vae"
    vae.mkdir()
    metadata = dataclasses.replace(checkpoints.LATENTS, vae=str(vae), class_names=('5" pipe', "b"))
    paths = {name: "/home/me/secret" for name in card.PRIVATE if name not in KINDS}
    known = {"enc_type": "none", "patch_size": 2, "exp_name": "secret-name"}
    run = checkpoints.run(tmp_path / "run", metadata, **known | paths)
    folder = load(run).save_pretrained(tmp_path / "out")
    texts = [path.read_text() for path in folder.rglob("*.*") if path.suffix != ".safetensors"]
    assert not [t for t in texts if "/home/me" in t or str(tmp_path) in t or "secret" in t]
    assert "on latents of my-vae" in texts[0] + texts[1] + texts[2] + texts[3] + texts[4]
    code = re.search(r"loaded\.sample\((\[.*?\]), count", (folder / "README.md").read_text())[1]
    assert ast.literal_eval(code) == ['5" pipe']


@pytest.mark.parametrize("vae, told", [
    ("sd-vae-ft-mse", "sd-vae-ft-mse"), ("owner/kl-f8", "owner/kl-f8"), ("/home/me/vae", "vae"),
    ("file:///home/me/vae", "vae"), (r"C:\Users\me\vae", "vae"), ("/home/me/none", "unnamed"),
    (".", "unnamed"), ("/", "unnamed"), ("none", "none"),
])  # fmt: skip
def test_an_autoencoder_is_told_by_a_name_that_is_no_place(vae, told):
    metadata = dataclasses.replace(checkpoints.LATENTS, vae=vae)
    assert card.public(metadata).vae == told


def test_class_names_are_shown_as_they_are(tmp_path):
    names = ("<script>", "![](http://x/y.png)", "[a](b)", "x" * 500, "cat, x", "cat")
    metadata = dataclasses.replace(checkpoints.LATENTS, class_names=names)
    tiny = load(checkpoints.run(tmp_path, checkpoints.LATENTS, enc_type="none", patch_size=2))
    loaded = dataclasses.replace(tiny, metadata=metadata)
    text = card.model_card(loaded, "me/x", Path("nowhere"))
    shown = text.split("## Classes\n\n")[1]
    assert shown.startswith(r"\<script\>, \!\[\]\(http://x/y.png\), \[a\]\(b\), " + "x" * 60 + ",")
    assert 'loaded.sample(["<script>"]' in text
    metadata = dataclasses.replace(metadata, class_names=("cat, x", "cat"))
    loaded = dataclasses.replace(tiny, metadata=metadata)
    assert "loaded.sample([0]" in card.model_card(loaded, "me/x", Path("nowhere"))


def test_names_of_settings_are_fields():
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert set(card.PRIVATE) <= fields
    commands = (GenerateConfig, EvalConfig)
    fields = {field.name for config in commands for field in dataclasses.fields(config)}
    assert {*card.PLACES, *card.UNTOLD} <= fields


def test_a_method_without_a_paper_is_shared_too(tmp_path, monkeypatch):
    monkeypatch.setattr(OBJECTIVES["flow"], "paper", "")
    known = checkpoints.official(tmp_path / "x.pt", checkpoints.sit(), num_heads=4)
    assert "## Papers" not in card.model_card(load(known), "me/x", tmp_path)


def test_of_weights_that_are_no_runs_the_card_says_what_they_are(tmp_path):
    known = checkpoints.official(tmp_path / "x.pt", checkpoints.sit(), num_heads=4)
    text = card.model_card(load(known), "me/x", tmp_path)
    assert "## Training" not in text and "samples.png" not in text
    assert "in 5 classes, on latents of sd-vae-ft-mse" in text and "2401.08740" in text
    assert 'loaded.sample(["0"], count=4, num_steps=50)  # uint8 (4, 3, 64, 64)' in text
