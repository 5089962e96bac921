"""Features for the analyses: what decides them, what the cache keeps, which rows are looked at."""

import copy
import functools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from repa_fast import encoders
from repa_fast.analysis import gather as module
from repa_fast.analysis.gather import (
    AnalysisConfig,
    chosen_rows,
    gather,
    open_splits,
    split_rows,
)
from repa_fast.analysis.hidden import collect
from repa_fast.configs.objective import ObjectiveConfig
from repa_fast.data.digits import digits_metadata
from repa_fast.data.official import OfficialFolder
from repa_fast.data.open import open_dataset
from repa_fast.diffusion.path import get
from repa_fast.objective import build_objective
from tests.analysis.analysing import TRAIN, VAL, coloured, noise_images, planes, write_table
from tests.eval import checkpoints
from tests.refusals import refused

CPU = torch.device("cpu")
ROWS = np.array([0, 3, 4, 9, 11, 20, 22])
VIT = ["digits-vit"]


@pytest.fixture
def dataset(data):
    return open_dataset(data)


def settings(cache="", **changes) -> AnalysisConfig:
    fields = {"ckpt": "run", "times": (0.2, 0.7), "batch_size": 3, "num_workers": 1}
    return AnalysisConfig(**fields | {"cache": str(cache)} | changes)


def gathered(loaded, dataset, config=None, rows=ROWS, names=VIT):
    return gather(loaded, dataset, rows, names, config or settings(), CPU)


@pytest.fixture(scope="module")
def whole(loaded, data):
    """Features of the rows."""
    return gathered(loaded, open_dataset(data))


def assert_same(a, b):
    assert torch.equal(a.hidden, b.hidden) and torch.equal(a.label, b.label)
    assert a.tokens.keys() == b.tokens.keys()
    assert all(torch.equal(a.tokens[name], b.tokens[name]) for name in a.tokens)


def test_features_are_those_of_the_rows(loaded, dataset):
    """Also an encoder's, from images that are made here."""
    found = gathered(loaded, dataset, settings(seed=3))
    images, labels = coloured(TRAIN, seed=0)
    assert found.hidden.shape == (2, 3, len(ROWS), 32) and found.hidden.dtype == torch.float32
    assert found.label.dtype == torch.int64 and found.label.tolist() == labels[ROWS].tolist()
    tokens = encoders.load("digits-vit", 16, CPU)(planes(images[ROWS])).mean(1)
    assert found.tokens.keys() == {"digits-vit"}
    assert torch.allclose(found.tokens["digits-vit"], tokens, rtol=0, atol=1e-5)
    pixels = planes(images[ROWS]).float() / 127.5 - 1
    batch = {
        "index": torch.from_numpy(ROWS),
        "moments": torch.cat([pixels, torch.zeros_like(pixels)], 1),
        "label": found.label,
    }
    expected = collect(
        loaded.model, [batch], (0.2, 0.7), count=len(ROWS), metadata=digits_metadata(),
        path=get(loaded.objective.path_type), seed=3,
    )  # fmt: skip
    assert torch.allclose(found.hidden, expected.hidden, rtol=1e-4, atol=1e-4)
    assert found.hidden.std() > 0.1


def test_batches_and_threads_do_not_matter(loaded, dataset, whole):
    other = gathered(loaded, dataset, settings(batch_size=5, num_workers=3))
    assert torch.equal(whole.label, other.label)
    assert torch.allclose(whole.hidden, other.hidden, rtol=1e-4, atol=1e-4)
    assert torch.allclose(whole.tokens["digits-vit"], other.tokens["digits-vit"], atol=1e-5)


def test_some_layers_are_a_slice_of_all(loaded, dataset, whole):
    config = settings(layers=(3, 1))
    some = gathered(loaded, dataset, config, names=[])
    assert torch.equal(some.hidden, whole.hidden[:, [2, 0]]) and some.tokens == {}
    assert config.layers_of(loaded) == [3, 1] and settings().layers_of(loaded) == [1, 2, 3]


def test_bf16_is_the_models_alone(loaded, dataset, whole):
    rounded = gathered(loaded, dataset, settings(mixed_precision="bf16"))
    assert torch.equal(whole.tokens["digits-vit"], rounded.tokens["digits-vit"])
    assert not torch.equal(whole.hidden, rounded.hidden)
    error = (whole.hidden - rounded.hidden).norm() / whole.hidden.norm()
    assert error < 0.05  # a few roundings of 2^-9 in each of 3 blocks


def test_other_layers_and_latents_than_there_are_are_refused(loaded, dataset, tmp_path):
    for layer in (0, 4):
        call = functools.partial(gathered, loaded, dataset, settings(tmp_path, layers=(1, layer)))
        refused(call, f"block is {layer}, expected 1..3")
    assert not list(tmp_path.iterdir())
    other = replace(loaded, model=checkpoints.sit().eval())
    refused(lambda: gathered(other, dataset, names=[]), r"3, 16, 16|4, 8, 8")


def test_the_second_time_nothing_is_computed_with_a_cache(
    loaded, dataset, whole, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    gathered(loaded, dataset, names=[])
    assert not list(tmp_path.iterdir())
    cache = tmp_path / "new" / "cache"
    assert_same(whole, gathered(loaded, dataset, settings(cache)))
    [file] = cache.iterdir()
    assert file.suffix == ".safetensors"
    assert torch.equal(load_file(file)["hidden"], whole.hidden)
    for name in ("encoders.load", "collect", "Loader"):
        monkeypatch.setattr(f"repa_fast.analysis.gather.{name}", None)
    assert_same(whole, gathered(loaded, dataset, settings(cache)))
    with pytest.raises(TypeError):
        gathered(loaded, dataset)


def test_a_file_of_the_cache_that_is_not_what_was_kept_is_made_again(
    loaded, dataset, whole, tmp_path
):
    gathered(loaded, dataset, settings(tmp_path))
    [file] = tmp_path.iterdir()
    kept, tensors = file.read_bytes(), load_file(file)
    for content in (
        kept[:-40],
        b"",
        {"x": torch.zeros(1)},
        tensors | {"hidden": tensors["hidden"][:, :, 1:].contiguous()},
        tensors | {"label": tensors["label"].float()},
    ):
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            save_file(content, file)
        assert_same(whole, gathered(loaded, dataset, settings(tmp_path)))
        assert file.read_bytes() == kept


def test_a_pass_that_fails_leaves_nothing(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.analysis.analysing.encode", lambda pixels: b"no image")
    write_table(tmp_path / "data" / "train.lance", *coloured(5, seed=0))
    bad, config = open_dataset(tmp_path / "data"), settings(tmp_path / "c")
    refused(lambda: gathered(loaded, bad, config, np.array([2, 3])), r"train\.lance row 2")
    assert not (tmp_path / "c").exists()


def test_a_cache_that_cannot_be_written_keeps_nothing(
    loaded, dataset, tmp_path, computed, monkeypatch
):
    (tmp_path / "file").touch()
    config = settings(tmp_path / "file")
    refused(lambda: gathered(loaded, dataset, config), "cache is .*file, which is a file")
    assert not computed

    def save_half(tensors, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    config = settings(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", save_half)
        refused(lambda: gathered(loaded, dataset, config), "No space", error=OSError)
    assert not list((tmp_path / "cache").iterdir())
    gathered(loaded, dataset, config)
    assert len(computed) == 2 and len(list((tmp_path / "cache").iterdir())) == 1


@pytest.fixture
def computed(monkeypatch):
    """How often features were computed; they are made up."""
    calls = []

    def compute(loaded, dataset, rows, files, config, device):
        calls.append(files)
        count, layers = len(rows), len(config.layers_of(loaded))
        widths = {name: encoders.spec(name).width for name in files}
        tokens = {f"tokens/{name}": torch.zeros(count, width) for name, width in widths.items()}
        hidden = torch.zeros(len(config.times), layers, count, 32)
        return {"hidden": hidden, "label": torch.zeros(count, dtype=torch.int64), **tokens}

    monkeypatch.setattr(module, "_compute", compute)
    return calls


OTHER_PATH = build_objective(ObjectiveConfig(path_type="cosine"))


def test_what_decides_features_decides_the_cache(loaded, dataset, tmp_path, computed):
    same = {"out": "elsewhere", "ckpt": "elsewhere", "data_dir": "elsewhere", "enc_weights": ""}
    same |= {"encoders": "digits-vit", "batch_size": 5, "num_workers": 2}
    calls = [{}, {"rows": ROWS[:-1]}, {"rows": ROWS + 1}]
    calls += [{"names": []}, {"names": ["digits-vit", "dinov2-vit-b"]}]
    configs = [{"times": (0.2, 0.6)}, {"times": (0.2,)}, {"layers": (1, 2)}, {"seed": 1}]
    configs += [{"enc_weights": "file.pth"}, {"mixed_precision": "bf16"}]
    changes = [({}, call) for call in calls] + [(config, {}) for config in configs]
    two_heads = copy.deepcopy(loaded.model)
    for block in two_heads.blocks:
        block.attn.num_heads = 2
    others = [{}, {"digest": "other"}, {"objective": OTHER_PATH}, {"model": two_heads}]
    for changed in (replace(loaded, **other) for other in others):
        for config, call in changes:
            before = len(computed)
            for more in ({}, {}, same):
                gathered(changed, dataset, settings(tmp_path, **more | config), **call)
                found = len(computed), len(list(tmp_path.iterdir()))
                assert found == (before + 1,) * 2, (config, call, more)
    assert computed[0] == {"digits-vit": ""}


def test_other_weights_of_a_checkpoint_have_features_of_their_own(run, dataset, tmp_path, computed):
    for weights in ("ema", "model", "ema", "model"):
        config = settings(tmp_path, ckpt=str(run), weights=weights)
        gathered(config.load(torch.device("cpu")), dataset, config)
    assert len(computed) == 2


def test_each_encoder_gets_its_file(loaded, dataset, computed):
    names = ["dinov2-vit-b", "digits-vit"]
    gathered(loaded, dataset, settings(enc_weights="a.pth,"), names=names)
    assert computed == [{"dinov2-vit-b": "a.pth", "digits-vit": ""}]
    few = settings(enc_weights="a.pth")
    words = r"enc_weights has 1 entries .* expected 2"
    refused(lambda: gathered(loaded, dataset, few, names=names), words)


def official(root, label: int):
    """An official folder of one latent."""
    name = "00000/img-mean-std-00000000.npy"
    (root / "vae-sd" / "00000").mkdir(parents=True, exist_ok=True)
    np.save(root / "vae-sd" / name, np.ones((8, 4, 4), np.float32))
    (root / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": [[name, label]]}))
    return root


def noise_table(folder, seed: int):
    shutil.rmtree(folder, ignore_errors=True)
    write_table(folder / "train.lance", noise_images(23, seed), [0] * 23)
    return folder


@pytest.mark.parametrize(
    "write, rows", [(noise_table, ROWS), (official, np.array([0]))], ids=["table", "official"]
)
def test_a_dataset_written_again_is_another(loaded, tmp_path, computed, write, rows):
    for version in (3, 11):  # of the images, or of their labels
        folder = write(tmp_path / "data", version)
        for _ in range(2):
            gathered(loaded, open_dataset(folder), settings(tmp_path / "cache"), rows, [])
    assert len(computed) == 2


def test_relative_paths_are_not_mixed_up(loaded, data, tmp_path, computed, monkeypatch):
    for name in ("a", "b"):
        shutil.copytree(data, tmp_path / name / "data")
        monkeypatch.chdir(tmp_path / name)
        gathered(loaded, open_dataset("data"), settings(tmp_path / "cache"))
    assert len(computed) == 2
    gathered(loaded, open_dataset(tmp_path / "b" / "data"), settings(tmp_path / "cache"))
    assert len(computed) == 2


def test_tables_apart_or_one_that_is_both(data, tmp_path):
    train, val, apart = open_splits(str(data))
    assert apart and (len(train), len(val)) == (TRAIN, VAL)
    assert open_splits(str(data / "train.lance"))[2] is False
    train, val, apart = open_splits(str(noise_table(tmp_path / "one", 0)))
    assert train is val and not apart and len(train) == 23
    train, val, apart = open_splits(str(official(tmp_path / "official", 0)))
    assert isinstance(train, OfficialFolder) and train is val and not apart


def test_digits_are_the_bundled_ones_and_a_url_arrives_as_it_is(tmp_path, digits_dir, monkeypatch):
    monkeypatch.setattr("repa_fast.data.open.ensure_digits", lambda: digits_dir)
    train, val, apart = open_splits("digits")
    assert apart and (len(train), len(val)) == (1500, 297)
    dataset, opened = open_dataset(noise_table(tmp_path, 0)), []
    monkeypatch.setattr(module, "open_dataset", lambda uri: opened.append(uri) or dataset)
    assert open_splits("s3://bucket/digits") == (dataset, dataset, False)
    assert opened == ["s3://bucket/digits"]


def assert_rows(chosen, lengths, end: int) -> None:
    """So many, ascending."""
    assert tuple(map(len, chosen)) == lengths
    for rows in chosen:
        assert rows.dtype == np.int64
        assert (np.diff(rows) > 0).all() and rows.min() >= 0 and rows.max() < end


@pytest.mark.parametrize("count, expected", [(0, 50), (7, 7), (50, 50), (51, 50)])
def test_chosen_rows(count, expected):
    rows, again, other = (chosen_rows(50, count, seed) for seed in (3, 3, 4))
    assert_rows([rows], (expected,), 50)
    assert np.array_equal(rows, again)
    assert np.array_equal(rows, other) == (expected == 50)


def test_every_row_can_be_chosen():
    rows = np.concatenate([chosen_rows(50, 7, seed) for seed in range(200)])
    counts = np.bincount(rows, minlength=50)  # Binomial(200, 0.14): mean 28, deviation 5
    assert counts.min() > 28 - 25 and counts.max() < 28 + 25


@pytest.mark.parametrize(
    "counts, lengths", [((0, 0), (90, 10)), ((12, 4), (12, 4)), ((99, 99), (90, 10))]
)
def test_split_rows(counts, lengths):
    first, again, other = (split_rows(100, *counts, seed=seed) for seed in (3, 3, 4))
    assert_rows(first, lengths, 100)
    assert not set(first[0].tolist()) & set(first[1].tolist())
    assert all(map(np.array_equal, first, again))
    assert not any(map(np.array_equal, first, other))
    for every, few in zip(split_rows(100, 0, 0, seed=3), first, strict=True):
        assert set(few.tolist()) <= set(every.tolist()), "what is held out depends on the counts"
    assert_rows(split_rows(3, 0, 0, 0), (2, 1), 3)
