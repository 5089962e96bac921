"""The autoencoder behind sample grids, against diffusers called directly."""

import contextlib
import dataclasses
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from repa_fast.configs import presets
from repa_fast.data import dataset, latents
from repa_fast.data.dataset import Metadata
from repa_fast.data.latents import VAE, full_name
from repa_fast.distributed import World
from repa_fast.train import loop
from repa_fast.train import run as runs
from repa_fast.train.report import Reporter
from repa_fast.train.state import build_state
from tests.data import encoding
from tests.refusals import refused

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.xdist_group("diffusers")

METADATA = Metadata(
    resolution=16, latent_shape=(4, 8, 8), vae="sd-vae-ft-mse", scale=0.18215, bias=0.25,
    class_names=("a", "b"),
)  # fmt: skip
TINY = {
    "hidden_size": 32, "depth": 2, "num_heads": 2, "encoder_depth": 1, "patch_size": 2,
    "num_classes": 2, "enc_type": "none", "num_steps": 2, "report_to": "none",
}  # fmt: skip


def config(**changes):
    return dataclasses.replace(presets.get("digits"), **TINY, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    encoding.autoencoder(blocks=2).save_pretrained(path)
    return str(path)


@pytest.fixture
def samples():
    return torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1)) + 0.25


def test_decoding_is_that_of_diffusers_with_weights_read_once_and_frozen(
    folder, samples, monkeypatch
):
    model, decoder = diffusers.AutoencoderKL.from_pretrained(folder), VAE(folder)
    module = decoder.load(METADATA)
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", None)
    with torch.no_grad():
        images = model.decode(((samples.double() - 0.25) / 0.18215).float()).sample
    levels = (255 * ((images + 1) / 2)).clamp(0, 255)
    rounded = decoder.decode(samples, METADATA, batch_size=5)
    cut = decoder.decode(samples, METADATA, batch_size=5, rounding=False)
    assert rounded.dtype == torch.uint8 and rounded.shape == (5, 3, 16, 16)
    assert levels.std() > 5
    assert torch.equal(rounded, levels.round().to(torch.uint8))
    assert torch.equal(cut, levels.to(torch.uint8))  # a cast cuts
    assert not torch.equal(cut, rounded)
    expected = decoder.decode(samples, METADATA)
    assert torch.equal(latents.to_pixels(samples, METADATA, decoder), expected)
    for batch_size in (1, 2, 5, 100):
        got = decoder.decode(samples, METADATA, batch_size=batch_size)
        # convolutions may sum in another order, which turns a level that lies on an edge
        assert (got.int() - expected.int()).abs().max() <= 1
        assert (got != expected).float().mean() < 1e-2
    assert decoder.load(METADATA) is module


@pytest.mark.gpu
def test_it_leaves_the_device_after_use(folder, samples):
    decoder = VAE(folder)
    images = decoder.decode(samples.cuda(), METADATA)
    assert images.is_cuda
    assert {p.device.type for p in decoder.load(METADATA).parameters()} == {"cpu"}


@pytest.mark.parametrize("name", sorted(latents.HUB))
def test_known_names_come_from_the_hub(name, monkeypatch):
    asked, decoder = [], VAE(name)

    def offline(source, **_):
        asked.append(source)
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", offline)
    words = rf"{name} is neither .*--vae.*no route to host\)"
    refused(lambda: decoder.load(METADATA), words, error=RuntimeError)
    assert asked == [f"stabilityai/{name}"]
    assert decoder.unavailable


@pytest.mark.parametrize("said, meant", [
    ("mse", "sd-vae-ft-mse"), ("ema", "sd-vae-ft-ema"), ("sd-vae-ft-ema", "sd-vae-ft-ema"),
    ("./ema", "./ema"), ("owner/mse", "owner/mse"), ("", ""),
])  # fmt: skip
def test_short_names_are_stability_s(said, meant):
    assert VAE(said).source == full_name(said) == meant


def test_an_autoencoder_of_other_latents_is_refused(folder):
    metadata = dataclasses.replace(METADATA, resolution=64)
    words = r"latents \(4, 32, 32\).*dataset's \(4, 8, 8\).*--vae$"
    refused(lambda: VAE(folder).load(metadata), words)


def spoiled(folder: str, path, **config) -> VAE:
    """A copy with another config, or without one weight."""
    shutil.copytree(folder, path)
    if config:
        fields = json.loads((path / "config.json").read_text()) | config
        (path / "config.json").write_text(json.dumps(fields))
        return VAE(str(path))
    (file,) = path.glob("*.safetensors")
    state = load_file(file)
    del state["encoder.conv_out.weight"]
    save_file(state, file)
    return VAE(str(path))


def test_an_autoencoder_without_all_of_its_weights_is_refused(folder, tmp_path):
    vae = spoiled(folder, tmp_path / "vae")
    for use in (vae.load, lambda _: vae.metadata(16, ("a",))):
        refused(
            lambda use=use: use(METADATA), r"lacks 1 of its weights.*: encoder\.conv_out\.weight"
        )


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "x", 0.0, 1e-320, None, [1.0]])
def test_an_autoencoder_whose_scale_is_none_is_refused(folder, tmp_path, scale):
    vae = spoiled(folder, tmp_path / "vae", scaling_factor=scale)
    words = "vae, its scaling_factor: scale is .*, expected a number from"
    refused(lambda: vae.metadata(16, ("a", "b")), words)


def test_an_autoencoders_own_scale_is_the_datasets(folder):
    metadata = VAE(folder).metadata(16, ("a", "b"))
    assert metadata == dataclasses.replace(METADATA, vae=folder, bias=0.0)


@pytest.mark.parametrize(
    "missing, advice", [("folder", "--vae"), ("package", "pip install diffusers")]
)
def test_without_it_one_line_warns_and_training_goes_on(
    tmp_path, monkeypatch, capsys, missing, advice
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if missing == "package":
        monkeypatch.setitem(sys.modules, "diffusers", None)
    world = World(0, 1, torch.device("cpu"))
    state = build_state(config(vae=str(tmp_path / "absent")), METADATA, world)
    with contextlib.closing(Reporter(tmp_path, 10, 0, None)) as reporter:
        for state.step in (3, 6, 9):
            loop.snapshot(SimpleNamespace(state=state, seen={}, reporter=reporter))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: no sample grids in this run: ")
    assert advice in line and str(tmp_path / "absent") in line
    assert not (tmp_path / "samples").exists()


def test_a_run_to_its_end_with_and_without_it(tmp_path, folder, capsys):
    pytest.importorskip("lance")
    image = dataset.encode(np.zeros((16, 16, 3), np.uint8))
    row = {"image": image, "moments": np.ones((8, 8, 8), np.float32), "label": 0}
    dataset.write(tmp_path / "data.lance", [row] * 24, METADATA)
    options = {"batch_size": 4, "max_train_steps": 2, "sampling_steps": 1}
    options |= {"data_dir": str(tmp_path / "data.lance"), "output_dir": str(tmp_path)}
    run = runs.train(config(exp_name="with", vae=folder, **options))
    grids = sorted(path.name for path in (run / "samples").iterdir())
    assert grids == ["0000001.png", "0000002.png"] and (run / "samples.png").exists()
    picture = np.asarray(Image.open(run / "samples" / "0000001.png"))
    assert picture.ndim == 3 and picture.shape[2] == 3 and picture.std() > 1
    assert json.loads((run / "args.json").read_text())["vae"] == folder
    capsys.readouterr()
    absent = str(tmp_path / "absent")
    run = runs.train(config(exp_name="without", vae=absent, **options))
    assert capsys.readouterr().out.count("no sample grids in this run") == 1
    assert (run / "loss.png").exists() and not (run / "samples.png").exists()
