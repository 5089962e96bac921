"""`repa-fast probe`: what it finds in images whose class is their colour, and what it writes."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from repa_fast.analysis import probe as module
from repa_fast.analysis.gather import CACHE, gather
from repa_fast.analysis.linear import PAPER, SMALL
from repa_fast.analysis.probe import ProbeConfig, probe, table
from repa_fast.eval.load import load
from tests.analysis.analysing import TRAIN, VAL, assert_picture, coloured, write_table
from tests.eval import checkpoints
from tests.refusals import refused

CHANCE = 0.45
"""Above what 60 guesses among 6 classes reach: 10 +- 2.9 hits, and this is 27."""


@pytest.fixture
def settings(fields):
    def make(**changes) -> ProbeConfig:
        return ProbeConfig(**fields | {"times": (0.05, 1.0)} | changes)

    return make


@pytest.fixture
def weights(tmp_path):
    """A file of bare weights, of the digits' sizes."""
    model = checkpoints.sit(input_size=16, patch_size=4, in_channels=3, num_classes=10)
    return checkpoints.official(tmp_path / "weights.pt", model, num_heads=4)


@pytest.fixture
def gathered(monkeypatch):
    """(dataset, rows) of each call of `gather`."""
    seen = []

    def keep(loaded, dataset, rows, *rest):
        seen.append((dataset.uri, rows.tolist()))
        return gather(loaded, dataset, rows, *rest)

    monkeypatch.setattr(module, "gather", keep)
    return seen


def probed(config: ProbeConfig) -> dict:
    """What `probe` writes."""
    said, out = probe(config), Path(config.out)
    results = json.loads((out / "probe.json").read_text())
    assert said == f"{table(results)}\n\n{out / 'probe.png'}"
    return results


def test_colours_are_seen_in_images_and_not_in_noise(settings, undrawn):
    """Also in some layers at some time, which are those of all."""
    found = probed(settings())
    near, noise = np.array(found["top1"])
    assert (near == 1).all() and (noise < CHANCE).all()
    assert found["encoders"] == {"digits-vit": {"top1": 1.0, "top5": 1.0}}
    assert (np.array(found["top5"]) >= np.array(found["top1"])).all()
    assert np.array(found["top5"])[0].min() == 1
    some = probed(settings(layers=(3, 1), times=(1.0,)))
    assert some["layers"] == [3, 1] and some["times"] == [1.0]
    # the noise of an image does not depend on the other times; its matrix products are batched
    assert some["top1"][0] == pytest.approx([noise[2], noise[0]], abs=2 / VAL)


def test_what_is_written(settings, loaded, tmp_path):
    found = probed(settings(seed=5, train_rows=50, val_rows=20))
    source = str(loaded.source)
    assert found["model"] == {
        "source": source, "step": 7, "weights": "ema", "digest": loaded.digest,
    }  # fmt: skip
    assert found["layers"] == [1, 2, 3] and found["times"] == [0.05, 1.0]
    assert np.shape(found["top1"]) == np.shape(found["top5"]) == (2, 3)
    assert found["rows"] == {"train": 50, "val": 20}
    assert found["settings"]["seed"] == 5 and found["settings"]["recipe"] == "small"
    assert set(found) == {
        "model", "layers", "times", "top1", "top5", "encoders", "rows", "settings",
    }  # fmt: skip
    assert_picture(tmp_path / "out" / "probe.png")
    lines = table(found).splitlines()
    assert lines[0] == "| layer | t = 0.05 | t = 1 |"
    for line, layer, one, other in zip(lines[2:5], (1, 2, 3), *found["top1"], strict=True):
        assert line == f"| {layer} | {100 * one:.1f} | {100 * other:.1f} |"
    assert lines[5].startswith("| digits-vit | ")
    assert lines[-1] == "top-1, %; learnt from 50 rows, judged on 20"


def test_the_seed_chooses_the_rows(settings, undrawn, gathered):
    for seed in (0, 1):
        probe(settings(seed=seed, train_rows=40, val_rows=20, times=(0.05,), encoders="none"))
    (train, rows), (val, held_out), (_, other_rows), (_, other_held_out) = gathered
    assert train.endswith("train.lance") and val.endswith("val.lance")
    assert (len(rows), len(held_out)) == (40, 20)
    assert rows != other_rows and held_out != other_held_out


def test_one_table_is_split(settings, data, undrawn, tmp_path, gathered):
    shutil.copytree(data / "train.lance", tmp_path / "one" / "train.lance")
    found = probed(settings(data_dir=str(tmp_path / "one"), times=(0.05,)))
    assert found["rows"] == {"train": 108, "val": 12} and np.min(found["top1"]) == 1
    learnt, held_out = (set(rows) for _, rows in gathered)
    assert not learnt & held_out and learnt | held_out == set(range(TRAIN))


def test_below_five_classes_there_is_no_top5(settings, undrawn, tmp_path):
    images, labels = coloured(40, seed=0)
    chosen = labels < 3
    write_table(tmp_path / "train.lance", images[chosen], labels[chosen], classes=3)
    found = probed(settings(data_dir=str(tmp_path), times=(0.05,)))
    assert found["top5"] == [None]
    assert found["encoders"]["digits-vit"]["top5"] is None


@pytest.mark.parametrize("name, recipe", [("small", SMALL), ("paper", PAPER)])
def test_recipes_go_by_their_names(settings, undrawn, monkeypatch, name, recipe):
    seen, fit = [], module.fit_probes

    def keep(*arguments, seed, device):
        seen.append((arguments[5], seed))
        return fit(*arguments[:5], replace(recipe, epochs=1), seed=seed, device=device)

    monkeypatch.setattr(module, "fit_probes", keep)
    probe(settings(recipe=name, seed=4, times=(0.05,)))
    assert seen == [(recipe, 4)] * 2  # a time and an encoder


def test_dataset_and_encoders_are_the_runs_unless_said(settings, loaded, data):
    assert settings().run_defaults(loaded) == (str(data), ["digits-vit"])
    said = settings(data_dir="other", encoders="none")
    assert said.run_defaults(loaded) == ("other", [])
    said = settings(encoders="dinov2-vit-b, digits-vit")
    assert said.run_defaults(loaded) == (str(data), ["dinov2-vit-b", "digits-vit"])
    assert settings().cache != ProbeConfig(ckpt="run").cache == str(CACHE)


@pytest.mark.parametrize("url", ["s3://bucket/data", "s3:/bucket/data", "gs://b\nx"])
def test_a_runs_dataset_at_a_url_is_opened_if_it_is_asked_for(settings, loaded, url, monkeypatch):
    """Whoever wrote the run's config would choose what is read with the user's credentials."""
    said = SimpleNamespace(config=SimpleNamespace(data_dir=url, enc_type="none"))
    monkeypatch.setattr("repa_fast.analysis.gather.read_settings", lambda source: said)
    monkeypatch.setattr("repa_fast.analysis.gather.open_dataset", None)
    refused(lambda: probe(settings()), re.escape(f"run's dataset is {url!r}, expected --data-dir"))
    assert settings(data_dir=url).run_defaults(loaded) == (url, [])


def test_bare_weights_need_a_dataset_and_have_no_baseline(settings, data, undrawn, weights):
    words = r"weights.pt does not say its dataset.*--data-dir"
    refused(lambda: probe(settings(ckpt=str(weights))), words)
    found = probed(settings(ckpt=str(weights), data_dir=str(data), times=(0.05,)))
    assert found["encoders"] == {} and found["model"]["step"] == 7
    assert np.min(found["top1"]) == 1


def test_results_lie_in_the_run_or_here(settings, run, weights, tmp_path):
    older = load(run / "checkpoints" / "0000003")
    assert settings(out="").output_folder(older, "probe") == run / "probe-0000003"
    trained = load(run, weights="model")
    assert settings(out="").output_folder(trained, "probe") == run / "probe-0000007-model"
    found = settings(out="").output_folder(load(weights), "probe")
    assert found == Path("probe-0000007")
    out = tmp_path / "a" / "b"
    assert settings(out=str(out)).output_folder(older, "probe") == out
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    refused(lambda: probe(settings(out=str(tmp_path / "file"))), "out is .*file, which is a file")


@pytest.mark.parametrize("changes, message", [
    ({"ckpt": "absent"}, "absent does not exist"),
    ({"data_dir": "absent"}, "no dataset at absent"),
    ({"layers": (4,)}, "block is 4, expected 1..3"),
    ({"encoders": "dinov2-vit-b"}, "dinov2-vit-b: resolution is 16"),
])  # fmt: skip
def test_what_does_not_fit_is_named(settings, monkeypatch, tmp_path, changes, message):
    monkeypatch.chdir(tmp_path)
    refused(lambda: probe(settings(cache="", **changes)), message)
    assert not (tmp_path / "out").exists()


def test_the_picture_shows_the_values_of_a_line_and_of_too_many_for_the_right(tmp_path):
    """Other values, other pixels."""
    numbers = np.arange(1, 10)
    values = np.outer(numbers, numbers) / 100
    line = {"layers": [1], "times": [0.1], "encoders": {}, "top1": [[0.1]]}
    many = line | {"layers": numbers, "times": numbers / 10, "top1": values}
    other, baseline = {"top1": values + 0.1 * (numbers == 5)}, {"encoders": {"vit": {"top1": 0.9}}}
    pictures = set()
    for results in (line, line | baseline, many, many | other):
        module.plot(results, tmp_path / "x.png")
        assert_picture(tmp_path / "x.png")
        pictures.add(Image.open(tmp_path / "x.png").tobytes())
    assert len(pictures) == 4
