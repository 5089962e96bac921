"""Features for the analyses: what decides them, what the cache keeps, which rows are looked at."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

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
from repa_fast.eval.load import load
from repa_fast.objective import build_objective
from tests.analysis.analysing import coloured, noise_images, planes, write_table
from tests.eval import checkpoints

CPU = torch.device("cpu")
COUNT = 23
ROWS = np.array([0, 3, 4, 9, 11, 20, 22])
VIT = ["digits-vit"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(checkpoints.run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_table(path / "train.lance", *coloured(COUNT, seed=0))
    return path


@pytest.fixture
def data(folder):
    return open_dataset(folder)


def settings(cache, **changes) -> AnalysisConfig:
    fields = {"ckpt": "run", "times": (0.2, 0.7), "batch_size": 3, "num_workers": 1}
    return AnalysisConfig(**fields | {"cache": str(cache)} | changes)


def assert_same(a, b):
    assert torch.equal(a.hidden, b.hidden) and torch.equal(a.label, b.label)
    assert a.tokens.keys() == b.tokens.keys()
    assert all(torch.equal(a.tokens[name], b.tokens[name]) for name in a.tokens)


def test_features_are_those_of_the_rows(loaded, data):
    """Also an encoder's, from images that are made here."""
    found = gather(loaded, data, ROWS, VIT, settings("", seed=3), CPU)
    images, labels = coloured(COUNT, seed=0)
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


@pytest.mark.parametrize("changes", [{"batch_size": 7}, {"batch_size": 64}, {"num_workers": 3}])
def test_batches_and_threads_do_not_matter(loaded, data, changes):
    one = gather(loaded, data, ROWS, VIT, settings(""), CPU)
    other = gather(loaded, data, ROWS, VIT, settings("", **changes), CPU)
    assert torch.equal(one.label, other.label)
    assert torch.allclose(one.hidden, other.hidden, rtol=1e-4, atol=1e-4)
    assert torch.allclose(one.tokens["digits-vit"], other.tokens["digits-vit"], atol=1e-5)


@pytest.mark.parametrize("layers", [(1,), (2, 3), (3, 1)])
def test_some_layers_are_a_slice_of_all(loaded, data, layers):
    whole = gather(loaded, data, ROWS, [], settings(""), CPU)
    config = settings("", layers=layers)
    some = gather(loaded, data, ROWS, [], config, CPU)
    assert torch.equal(some.hidden, whole.hidden[:, [layer - 1 for layer in layers]])
    assert some.tokens == {}
    assert config.layers_of(loaded) == list(layers)
    assert settings("").layers_of(loaded) == [1, 2, 3]


def test_bf16_is_the_models_alone(loaded, data):
    exact = gather(loaded, data, ROWS, VIT, settings(""), CPU)
    rounded = gather(loaded, data, ROWS, VIT, settings("", mixed_precision="bf16"), CPU)
    assert torch.equal(exact.tokens["digits-vit"], rounded.tokens["digits-vit"])
    assert not torch.equal(exact.hidden, rounded.hidden)
    error = (exact.hidden - rounded.hidden).norm() / exact.hidden.norm()
    assert error < 0.05  # a few roundings of 2^-9 in each of 3 blocks


@pytest.mark.parametrize("layer", [0, 4])
def test_layers_that_are_not_there_are_refused(loaded, data, tmp_path, layer):
    with pytest.raises(ValueError, match=f"block is {layer}, expected 1..3"):
        gather(loaded, data, ROWS, [], settings(tmp_path, layers=(1, layer)), CPU)
    assert not list(tmp_path.iterdir())


def test_a_dataset_of_other_latents_is_refused(data, tmp_path):
    other = load(checkpoints.run(tmp_path, checkpoints.LATENTS, enc_type="none", patch_size=2))
    with pytest.raises(ValueError, match=r"3, 16, 16|4, 8, 8"):
        gather(other, data, ROWS, [], settings(""), CPU)


def test_the_second_time_nothing_is_computed(loaded, data, tmp_path, monkeypatch):
    cache = tmp_path / "new" / "cache"
    first = gather(loaded, data, ROWS, VIT, settings(cache), CPU)
    [file] = cache.iterdir()
    assert file.suffix == ".safetensors"
    stored = load_file(file)
    assert torch.equal(stored["hidden"], first.hidden)
    for name in ("encoders.load", "collect", "Loader"):
        monkeypatch.setattr(f"repa_fast.analysis.gather.{name}", None)
    second = gather(loaded, data, ROWS, VIT, settings(cache), CPU)
    assert_same(first, second)
    assert_same(first, gather(loaded, data, ROWS, VIT, settings(str(cache)), CPU))
    with pytest.raises(TypeError):
        gather(loaded, data, ROWS, VIT, settings(""), CPU)


def test_nothing_is_kept_without_a_cache(loaded, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gather(loaded, data, ROWS, [], settings(""), CPU)
    assert not list(tmp_path.iterdir())


def test_a_pass_that_fails_leaves_nothing(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.analysis.analysing.png", lambda pixels: b"no image")
    write_table(tmp_path / "data" / "train.lance", *coloured(5, seed=0))
    data, config = open_dataset(tmp_path / "data"), settings(tmp_path / "c")
    with pytest.raises(ValueError, match=r"train\.lance row 2"):
        gather(loaded, data, np.array([2, 3]), VIT, config, CPU)
    assert not (tmp_path / "c").exists()


@pytest.fixture
def computed(monkeypatch):
    """How often features were computed; they are made up."""
    calls = []

    def compute(loaded, dataset, rows, files, config, device):
        calls.append(files)
        tokens = {f"tokens/{name}": torch.zeros(1) for name in files}
        return {"hidden": torch.zeros(1), "label": torch.zeros(1), **tokens}

    monkeypatch.setattr(module, "_compute", compute)
    return calls


@pytest.mark.parametrize(
    "changes",
    [
        {"digest": "other"},
        {"objective": build_objective(ObjectiveConfig(path_type="cosine"))},
        {"rows": ROWS[:-1]},
        {"rows": ROWS + 1},
        {"times": (0.2, 0.6)},
        {"times": (0.2,)},
        {"layers": (1, 2)},
        {"seed": 1},
        {"names": []},
        {"names": ["digits-vit", "dinov2-vit-b"]},
        {"enc_weights": "file.pth"},
        {"mixed_precision": "bf16"},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_what_decides_features_decides_the_cache(loaded, data, tmp_path, computed, changes):
    gather(loaded, data, ROWS, VIT, settings(tmp_path), CPU)
    of_model = {k: v for k, v in changes.items() if k in ("digest", "objective")}
    rest = {k: v for k, v in changes.items() if k not in (*of_model, "rows", "names")}
    arguments = (
        dataclasses.replace(loaded, **of_model), data, changes.get("rows", ROWS),
        changes.get("names", VIT), settings(tmp_path, **rest), CPU,
    )  # fmt: skip
    gather(*arguments)
    assert len(computed) == 2
    gather(*arguments)
    gather(loaded, data, ROWS, VIT, settings(tmp_path), CPU)
    assert len(computed) == 2 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 5},
        {"num_workers": 2},
        {"out": "elsewhere"},
        {"ckpt": "elsewhere"},
        {"data_dir": "elsewhere"},
        {"encoders": "digits-vit"},
        {"enc_weights": ""},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_what_does_not_decide_features_does_not(loaded, data, tmp_path, computed, changes):
    gather(loaded, data, ROWS, VIT, settings(tmp_path), CPU)
    gather(loaded, data, ROWS, VIT, settings(tmp_path, **changes), CPU)
    assert computed == [{"digits-vit": ""}]


def test_each_encoder_gets_its_file(loaded, data, tmp_path, computed):
    names = ["dinov2-vit-b", "digits-vit"]
    gather(loaded, data, ROWS, names, settings(tmp_path, enc_weights="a.pth,"), CPU)
    assert computed == [{"dinov2-vit-b": "a.pth", "digits-vit": ""}]
    with pytest.raises(ValueError, match=r"enc_weights has 1 entries .* expected 2"):
        gather(loaded, data, ROWS, names, settings(tmp_path, enc_weights="a.pth"), CPU)


def test_a_dataset_written_again_is_another(loaded, folder, tmp_path, computed):
    shutil.copytree(folder, tmp_path / "data")
    data = tmp_path / "data"
    cache = settings(tmp_path / "cache")
    gather(loaded, open_dataset(data), ROWS, VIT, cache, CPU)
    gather(loaded, open_dataset(data), ROWS, VIT, cache, CPU)
    assert len(computed) == 1
    shutil.rmtree(data)
    write_table(data / "train.lance", noise_images(COUNT), [0] * COUNT)
    gather(loaded, open_dataset(data), ROWS, VIT, cache, CPU)
    assert len(computed) == 2


def test_relative_paths_are_not_mixed_up(loaded, folder, tmp_path, computed, monkeypatch):
    for name in ("a", "b"):
        shutil.copytree(folder, tmp_path / name / "data")
        monkeypatch.chdir(tmp_path / name)
        gather(loaded, open_dataset("data"), ROWS, VIT, settings(tmp_path / "cache"), CPU)
    assert len(computed) == 2
    absolute = open_dataset(tmp_path / "b" / "data")
    gather(loaded, absolute, ROWS, VIT, settings(tmp_path / "cache"), CPU)
    assert len(computed) == 2


def official(root, label: int):
    """An official folder of one latent."""
    (root / "vae-sd" / "00000").mkdir(parents=True)
    name = "00000/img-mean-std-00000000.npy"
    np.save(root / "vae-sd" / name, np.ones((8, 4, 4), np.float32))
    relabel(root, label)
    return root


def relabel(root, label: int) -> None:
    listing = {"labels": [["00000/img-mean-std-00000000.npy", label]]}
    (root / "vae-sd" / "dataset.json").write_text(json.dumps(listing))


def test_an_official_folder_with_new_labels_is_another(loaded, tmp_path, computed):
    root, rows = official(tmp_path / "data", 3), np.array([0])
    config = settings(tmp_path / "cache")
    gather(loaded, open_dataset(root), rows, [], config, CPU)
    gather(loaded, open_dataset(root), rows, [], config, CPU)
    assert len(computed) == 1
    relabel(root, 11)
    gather(loaded, open_dataset(root), rows, [], config, CPU)
    assert len(computed) == 2


def test_tables_apart_or_one_that_is_both(folder, tmp_path):
    train, val, apart = open_splits(str(folder))
    assert train is val and not apart and len(train) == COUNT
    assert open_splits(str(folder / "train.lance"))[2] is False
    for split, count in (("train", 4), ("val", 3)):
        write_table(tmp_path / f"{split}.lance", *coloured(count, seed=0))
    train, val, apart = open_splits(str(tmp_path))
    assert apart and (len(train), len(val)) == (4, 3)
    train, val, apart = open_splits(str(official(tmp_path / "official", 0)))
    assert isinstance(train, OfficialFolder) and train is val and not apart


def test_digits_are_made_where_they_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train, val, apart = open_splits("digits")
    assert apart and (len(train), len(val)) == (1500, 297)


def test_a_url_arrives_as_it_is(data, monkeypatch):
    opened = []
    monkeypatch.setattr(module, "open_dataset", lambda uri: opened.append(uri) or data)
    assert open_splits("s3://bucket/digits") == (data, data, False)
    assert opened == ["s3://bucket/digits"]


@pytest.mark.parametrize("count, expected", [(0, 50), (7, 7), (50, 50), (51, 50)])
def test_chosen_rows(count, expected):
    rows = chosen_rows(50, count, 3)
    assert len(rows) == len(set(rows.tolist())) == expected and rows.dtype == np.int64
    assert (np.diff(rows) > 0).all() and rows.min() >= 0 and rows.max() < 50
    assert np.array_equal(rows, chosen_rows(50, count, 3))
    assert np.array_equal(rows, chosen_rows(50, count, 4)) == (expected == 50)


def test_every_row_can_be_chosen():
    rows = np.concatenate([chosen_rows(50, 7, seed) for seed in range(200)])
    counts = np.bincount(rows, minlength=50)  # Binomial(200, 0.14): mean 28, deviation 5
    assert counts.min() > 28 - 25 and counts.max() < 28 + 25


@pytest.mark.parametrize(
    "counts, lengths", [((0, 0), (90, 10)), ((12, 4), (12, 4)), ((99, 99), (90, 10))]
)
def test_split_rows(counts, lengths):
    train, val = split_rows(100, *counts, seed=3)
    assert (len(train), len(val)) == lengths
    assert not set(train.tolist()) & set(val.tolist())
    for rows in (train, val):
        assert (np.diff(rows) > 0).all() and rows.min() >= 0 and rows.max() < 100
    again, other = split_rows(100, *counts, seed=3), split_rows(100, *counts, seed=4)
    assert all(np.array_equal(one, two) for one, two in zip((train, val), again, strict=True))
    assert not np.array_equal(train, other[0]) and not np.array_equal(val, other[1])


def test_what_is_held_out_does_not_depend_on_the_counts():
    whole, some = split_rows(100, 0, 0, 0), split_rows(100, 12, 4, 0)
    for every, few in zip(whole, some, strict=True):
        assert set(few.tolist()) <= set(every.tolist())


def test_a_row_is_held_out_of_few():
    train, val = split_rows(3, 0, 0, 0)
    assert (len(train), len(val)) == (2, 1)
