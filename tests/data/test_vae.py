"""The autoencoder behind sample grids, against diffusers called directly."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

from repa_fast.configs import presets
from repa_fast.data import dataset, latents
from repa_fast.data.dataset import Metadata
from repa_fast.data.latents import VAE
from repa_fast.distributed import World
from repa_fast.train import loop
from repa_fast.train import run as runs
from repa_fast.train.report import Reporter
from repa_fast.train.state import build_state
from tests.data import encoding
from tests.refusals import refused

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
def model():
    return encoding.autoencoder(blocks=2)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    model.save_pretrained(path)
    return str(path)


@pytest.fixture
def samples():
    return torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1)) + 0.25


@pytest.fixture
def snapshot(tmp_path):
    """(vae_path, *steps) -> sample grids of a tiny run at these steps, in `tmp_path`."""

    def snap(vae_path: str, *steps: int) -> None:
        world = World(0, 1, torch.device("cpu"))
        running = build_state(config(vae_path=vae_path), METADATA, world)
        reporter = Reporter(tmp_path, 10, 0, None)
        for running.step in steps:
            loop.snapshot(SimpleNamespace(state=running, folder=tmp_path, reporter=reporter))
        reporter.close()

    return snap


def test_decoding_is_that_of_diffusers(model, folder, samples):
    with torch.no_grad():
        images = model.decode(((samples.double() - 0.25) / 0.18215).float()).sample
    levels = (255 * ((images + 1) / 2)).clamp(0, 255)
    decoder = VAE(folder)
    rounded = decoder.decode(samples, METADATA, batch_size=5)
    cut = decoder.decode(samples, METADATA, batch_size=5, rounding=False)
    assert rounded.dtype == torch.uint8 and rounded.shape == (5, 3, 16, 16)
    assert levels.std() > 5
    assert torch.equal(rounded, levels.round().to(torch.uint8))
    assert torch.equal(cut, levels.to(torch.uint8))  # a cast cuts
    assert not torch.equal(cut, rounded)
    pixels = latents.to_pixels(samples, METADATA, decoder)
    assert torch.equal(pixels, decoder.decode(samples, METADATA))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_the_batch_size_does_not_matter(folder, samples, batch_size):
    decoder = VAE(folder)
    expected = decoder.decode(samples, METADATA).int()
    got = decoder.decode(samples, METADATA, batch_size=batch_size).int()
    # convolutions may sum in another order, which turns a level that lies on an edge
    assert (got - expected).abs().max() <= 1 and (got != expected).float().mean() < 1e-2


def test_the_weights_are_read_once_and_are_frozen(folder, samples, monkeypatch):
    from diffusers import AutoencoderKL

    decoder = VAE(folder)
    module = decoder.load(METADATA)
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", None)
    assert decoder.decode(samples, METADATA).shape == (5, 3, 16, 16)
    assert decoder.load(METADATA) is module


@pytest.mark.gpu
def test_it_leaves_the_device_after_use(folder, samples):
    decoder = VAE(folder)
    images = decoder.decode(samples.cuda(), METADATA)
    assert images.is_cuda
    assert {p.device.type for p in decoder.load(METADATA).parameters()} == {"cpu"}


@pytest.mark.parametrize("name", sorted(latents.HUB))
def test_known_names_come_from_the_hub(name, monkeypatch):
    from diffusers import AutoencoderKL

    asked, decoder = [], VAE(name)

    def offline(source, **_):
        asked.append(source)
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", offline)
    words = rf"{name} is neither .*--vae-path.*no route to host\)"
    refused(lambda: decoder.load(METADATA), words, error=RuntimeError)
    assert asked == [f"stabilityai/{name}"]
    assert decoder.unavailable


def test_an_autoencoder_of_other_latents_is_refused(folder):
    metadata = dataclasses.replace(METADATA, resolution=64)
    words = r"latents \(4, 32, 32\).*dataset's \(4, 8, 8\).*vae-path"
    refused(lambda: VAE(folder).load(metadata), words)


@pytest.mark.parametrize(
    "missing, advice", [("folder", "--vae-path"), ("package", "pip install diffusers")]
)
def test_without_it_one_line_warns_and_training_goes_on(
    snapshot, tmp_path, monkeypatch, capsys, missing, advice
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if missing == "package":
        monkeypatch.setitem(sys.modules, "diffusers", None)
    snapshot(str(tmp_path / "absent"), 3, 6, 9)
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
    run = runs.train(config(exp_name="with", vae_path=folder, **options))
    grids = sorted(path.name for path in (run / "samples").iterdir())
    assert grids == ["0000001.png", "0000002.png"] and (run / "samples.png").exists()
    picture = np.asarray(Image.open(run / "samples" / "0000001.png"))
    assert picture.ndim == 3 and picture.shape[2] == 3 and picture.std() > 1
    assert json.loads((run / "args.json").read_text())["vae_path"] == folder
    capsys.readouterr()
    absent = str(tmp_path / "absent")
    run = runs.train(config(exp_name="without", vae_path=absent, **options))
    assert capsys.readouterr().out.count("no sample grids in this run") == 1
    assert (run / "loss.png").exists() and not (run / "samples.png").exists()
