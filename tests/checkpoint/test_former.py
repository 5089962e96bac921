"""What an earlier version wrote is read now and ever after, and means what it meant.

Two runs of commit fbaf119, of 200 steps on the digits, and what fbaf119 made of them: the metrics
of four more steps, the hashes of what it exported, samples, and scores. repa is the preset digits,
sra the preset digits-sra with DiT's objective, both with

    --hidden-size 8 --depth 2 --num-heads 2 --batch-size 16 --max-train-steps 200 --num-steps 8
    --learning-rate 1e-2 --ema-decay 0.95 --sampling-steps 0 --log-every 50

and repa's with --encoder-depth 1 --projector-dim 8, sra's with --objective ddpm --model DiT-S/4
--block-out-s 1 --block-out-t 2 --mode sde --compile-mode max-autotune. Another CPU may round
otherwise, hence the tolerances; weights are compared bit by bit.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from repa_fast.checkpoint.export import export
from repa_fast.configs import config as configs
from repa_fast.configs.config import RETIRED, from_saved
from repa_fast.diffusion import ddpm_samplers
from repa_fast.eval.digits import evaluate
from repa_fast.eval.generate import GenerateConfig, generate
from repa_fast.eval.info import InfoConfig, info
from repa_fast.eval.load import load
from repa_fast.train.run import train
from tests.refusals import refused

FORMER = Path(__file__).parent / "former"
STEP = 200


@dataclass
class Run:
    """A former run's folder, unpacked, and what fbaf119 made of it."""

    folder: Path
    checkpoint: Path
    values: dict
    arrays: dict[str, np.ndarray]


@pytest.fixture(params=["repa", "sra"])
def run(request, tmp_path) -> Run:
    name = request.param
    shutil.unpack_archive(FORMER / f"{name}.tar.gz", tmp_path / name, filter="data")
    values = json.loads((FORMER / f"{name}.json").read_text())
    with np.load(FORMER / f"{name}.npz") as arrays:
        folder = tmp_path / name
        return Run(folder, folder / "checkpoints" / f"{STEP:07d}", values, dict(arrays))


def digest(tensors: dict[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def numbers(reading: dict) -> dict[str, float]:
    """A reading, or scores, without times, what is None (where no batch had such a t), and the
    learning rate, which fbaf119 did not write."""
    by_t = {f"loss at {n}": value for n, value in enumerate(reading.get("loss_by_t", []))}
    flat = {name: value for name, value in (reading | by_t).items() if name != "loss_by_t"}
    left = ("images_per_second", "mfu", "stall_ms", "eta_seconds", "learning_rate")
    return {name: v for name, v in flat.items() if name not in left and v is not None}


def test_it_resumes_to_the_same_losses(run, digits_dir):
    saved = from_saved(json.loads((run.folder / "args.json").read_text()))
    place = {"output_dir": str(run.folder.parent), "data_dir": digits_dir, "resume": "auto"}
    config = replace(saved, **place, max_train_steps=STEP + 4, log_every=1)
    assert train(config) == run.folder
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(run.values["metrics"]) == 4
    for line, former in zip(lines, run.values["metrics"], strict=True):
        assert numbers(json.loads(line)) == pytest.approx(numbers(former), rel=1e-6, abs=1e-6)
    assert (run.folder / "checkpoints" / f"{STEP + 4:07d}" / "COMPLETE").exists()


def test_it_is_exported_to_the_same_files(run, tmp_path):
    export(run.checkpoint, "safetensors", tmp_path / "ema.safetensors")
    assert digest(load_file(tmp_path / "ema.safetensors")) == run.values["ema"]
    described = json.loads((tmp_path / "ema.json").read_text())
    for part, former in run.values["described"].items():
        assert described[part] | former == described[part]
    export(run.checkpoint, "official", tmp_path / "all.pt")
    contents = torch.load(tmp_path / "all.pt", weights_only=False)
    assert contents["steps"] == STEP
    assert digest(contents["model"]) == run.values["model"]
    assert digest(contents["ema"]) == run.values["ema"]
    moments = {
        f"{number}.{key}": value
        for number, state in contents["opt"]["state"].items()
        for key, value in state.items()
    }
    assert digest(moments) == run.values["optimizer"]


def test_it_is_sampled_to_the_same_images(run, tmp_path):
    paths = {"ckpt": str(run.folder), "sample_dir": str(tmp_path / "samples")}
    options = {"num_fid_samples": 6, "per_proc_batch_size": 4, "num_steps": 6, "labels": "balanced"}
    mode = "sde" if "latents" in run.arrays else "ode"
    out = generate(GenerateConfig(**paths, **options, mode=mode))
    with np.load(out) as made:
        assert (made["arr_1"] == run.arrays["labels"]).all()
        apart = np.abs(made["arr_0"].astype(int) - run.arrays["images"])
    assert apart.max() <= 1 and (apart > 0).mean() < 0.01  # values are cut off to integers


@pytest.mark.parametrize("run", ["sra"], indirect=True)
def test_a_chain_ends_at_the_same_latents(run):
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 4])
    model = load(run.folder).model
    options = {"mode": "sde", "num_steps": 4, "cfg_scale": 1.5, "seed": 0}
    latents = ddpm_samplers.sample(model, noise, labels, **options).numpy()
    former = run.arrays["latents"]  # of a model this small they reach 600
    assert np.abs(latents - former).max() <= 1e-6 * np.abs(former).max()


@pytest.mark.usefixtures("heavy")
def test_it_is_evaluated_to_the_same_scores(run):
    scores = asdict(evaluate(run.folder, count=100))
    assert scores.pop("weights") == "ema"
    assert numbers(scores) == pytest.approx(numbers(run.values["scores"]), rel=1e-4)


def test_it_is_described_and_its_settings_keep_their_values(run):
    text = info(InfoConfig(path=str(run.folder)))
    assert f"native checkpoint of step {STEP}" in text and "depth 2, width 8" in text
    for file in (run.folder / "args.json", run.checkpoint / "config.json"):
        saved = json.loads(file.read_text())
        now = from_saved(saved).to_dict()
        assert saved.keys() - now.keys() == RETIRED.keys() - now.keys()
        for name in saved.keys() - RETIRED.keys():
            assert now[name] == saved[name], name
        assert now["cuda_graph"] == "off" and not now["stop_on_spike"]


def test_a_flag_that_cannot_be_honoured_is_refused_with_the_reason(monkeypatch):
    for name, why in (configs.REFUSED | {"warp": "nothing is faster than light"}).items():
        monkeypatch.setitem(configs.REFUSED, name, why)
        refused(lambda name=name: from_saved({name: 9}), f"a saved config has {name} 9: {why}")
