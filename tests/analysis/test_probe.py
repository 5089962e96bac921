"""`repa-fast probe`: what it finds in images whose class is their colour, and what it writes."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from repa_fast.analysis import probe as module
from repa_fast.analysis.gather import CACHE, gather
from repa_fast.analysis.linear import PAPER, SMALL
from repa_fast.analysis.probe import ProbeConfig, probe, table
from repa_fast.eval.load import load
from tests.analysis.analysing import COLOURS, assert_picture, coloured, write_table
from tests.eval import checkpoints

CLASSES, TRAIN, VAL = len(COLOURS), 120, 60
CHANCE = 0.45
"""Above what 60 guesses among 6 classes reach: 10 +- 2.9 hits, and this is 27."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_table(folder / "train.lance", *coloured(TRAIN, seed=0))
    write_table(folder / "val.lance", *coloured(VAL, seed=1))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """A run of the digits' sizes that says it was trained on the colours."""
    return checkpoints.run(tmp_path_factory.mktemp("run"), steps=(3, 7), data_dir=str(data))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def settings(run, cache, tmp_path):
    def make(**changes) -> ProbeConfig:
        fields = {
            "ckpt": str(run), "times": (0.05, 1.0), "cache": cache, "out": str(tmp_path / "out"),
            "num_workers": 1,
        }  # fmt: skip
        return ProbeConfig(**fields | changes)

    return make


def probed(config: ProbeConfig) -> dict:
    """What `probe` writes."""
    said = probe(config)
    out = module.Path(config.out)
    assert_picture(out / "probe.png")
    results = json.loads((out / "probe.json").read_text())
    assert said == f"{table(results)}\n\n{out / 'probe.png'}"
    return results


def test_colours_are_seen_in_images_and_not_in_noise(settings):
    found = probed(settings())
    near, noise = np.array(found["top1"])
    assert (near == 1).all() and (noise < CHANCE).all()
    assert found["encoders"] == {"digits-vit": {"top1": 1.0, "top5": 1.0}}
    assert (np.array(found["top5"]) >= np.array(found["top1"])).all()
    assert np.array(found["top5"])[0].min() == 1


def test_what_is_written(settings, run):
    config = settings(seed=5, train_rows=50, val_rows=20)
    found = probed(config)
    loaded = load(run)
    assert found["model"] == {
        "source": str(run / "checkpoints" / "0000007"),
        "step": 7,
        "digest": loaded.digest,
    }
    assert found["layers"] == [1, 2, 3] and found["times"] == [0.05, 1.0]
    assert np.shape(found["top1"]) == np.shape(found["top5"]) == (2, 3)
    assert found["rows"] == {"train": 50, "val": 20}
    assert found["settings"]["seed"] == 5 and found["settings"]["recipe"] == "small"
    assert set(found) == {
        "model", "layers", "times", "top1", "top5", "encoders", "rows", "settings",
    }  # fmt: skip
    lines = table(found).splitlines()
    assert lines[0] == "| layer | t = 0.05 | t = 1 |"
    for line, layer, one, other in zip(lines[2:5], (1, 2, 3), *found["top1"], strict=True):
        assert line == f"| {layer} | {100 * one:.1f} | {100 * other:.1f} |"
    assert lines[5].startswith("| digits-vit | ")
    assert lines[-1] == "top-1, %; learnt from 50 rows, judged on 20"


def test_true_labels_decide_accuracy_and_never_the_features(settings, data, run, tmp_path):
    """The model gets the null label, so no other label of the dataset can show in its states."""
    shuffled = tmp_path / "shuffled"
    labels = {}
    for split, count, seed in (("train", TRAIN, 0), ("val", VAL, 1)):
        images, true = coloured(count, seed)
        labels[split] = np.random.default_rng(9 + seed).permutation(true)
        write_table(shuffled / f"{split}.lance", images, labels[split])
    assert (labels["val"] == coloured(VAL, 1)[1]).mean() < CHANCE
    found = probed(settings(data_dir=str(shuffled)))
    assert np.max(found["top1"]) < CHANCE and found["encoders"]["digits-vit"]["top1"] < CHANCE
    loaded, rows = load(run), np.arange(TRAIN)
    of_true, of_shuffled = (
        gather(
            loaded, module.open_splits(str(folder))[0], rows, ["digits-vit"],
            settings(cache=""), module.own_device(),
        )
        for folder in (data, shuffled)
    )  # fmt: skip
    assert of_shuffled.label.tolist() == labels["train"].tolist()
    assert of_true.label.tolist() == coloured(TRAIN, 0)[1].tolist()
    assert (of_true.hidden == of_shuffled.hidden).all()
    assert (of_true.tokens["digits-vit"] == of_shuffled.tokens["digits-vit"]).all()


def test_some_layers_and_times_are_those_of_all(settings):
    whole = probed(settings())
    some = probed(settings(layers=(3, 1), times=(1.0,)))
    assert some["layers"] == [3, 1] and some["times"] == [1.0]
    # the noise of an image does not depend on the other times; its matrix products are batched
    expected = [whole["top1"][1][2], whole["top1"][1][0]]
    assert some["top1"][0] == pytest.approx(expected, abs=2 / VAL)


def test_the_seed_chooses_the_rows(settings, monkeypatch):
    seen = []

    def keep(loaded, dataset, rows, *rest):
        seen.append((dataset.uri, rows.tolist()))
        return gather(loaded, dataset, rows, *rest)

    monkeypatch.setattr(module, "gather", keep)
    for seed in (0, 1):
        probe(settings(seed=seed, train_rows=40, val_rows=20, times=(0.05,)))
    (train, rows), (val, held_out), (_, other_rows), (_, other_held_out) = seen
    assert train.endswith("train.lance") and val.endswith("val.lance")
    assert (len(rows), len(held_out)) == (40, 20)
    assert rows != other_rows and held_out != other_held_out


def test_one_table_is_split(settings, data, tmp_path, monkeypatch):
    shutil.copytree(data / "train.lance", tmp_path / "one" / "train.lance")
    seen = []

    def keep(loaded, dataset, rows, *rest):
        seen.append(set(rows.tolist()))
        return gather(loaded, dataset, rows, *rest)

    monkeypatch.setattr(module, "gather", keep)
    found = probed(settings(data_dir=str(tmp_path / "one"), times=(0.05,)))
    assert found["rows"] == {"train": 108, "val": 12} and np.min(found["top1"]) == 1
    assert not seen[0] & seen[1] and seen[0] | seen[1] == set(range(TRAIN))


def test_below_five_classes_there_is_no_top5(settings, tmp_path):
    images, labels = coloured(40, seed=0)
    chosen = labels < 3
    write_table(tmp_path / "train.lance", images[chosen], labels[chosen], classes=3)
    found = probed(settings(data_dir=str(tmp_path), times=(0.05,)))
    assert found["top5"] == [None]
    assert found["encoders"]["digits-vit"]["top5"] is None


@pytest.mark.parametrize("name, recipe", [("small", SMALL), ("paper", PAPER)])
def test_recipes_go_by_their_names(settings, monkeypatch, name, recipe):
    seen = []

    def keep(*arguments, seed, device):
        seen.append((arguments[5], seed))
        return fit(*arguments, seed=seed, device=device)

    fit = module.fit_probes
    monkeypatch.setattr(module, "fit_probes", keep)
    probe(settings(recipe=name, seed=4, times=(0.05,)))
    assert seen == [(recipe, 4)] * 2  # a time and an encoder


def test_no_encoder_is_no_baseline(settings):
    found = probed(settings(encoders="none", times=(0.05,)))
    assert found["encoders"] == {} and np.min(found["top1"]) == 1


def test_dataset_and_encoders_are_the_runs_unless_said(settings, run, data):
    loaded = load(run)
    assert settings().run_defaults(loaded) == (str(data), ["digits-vit"])
    said = settings(data_dir="other", encoders="none")
    assert said.run_defaults(loaded) == ("other", [])
    said = settings(encoders="dinov2-vit-b, digits-vit")
    assert said.run_defaults(loaded) == (str(data), ["dinov2-vit-b", "digits-vit"])


def test_bare_weights_need_a_dataset(settings, data, tmp_path):
    weights = checkpoints.official(tmp_path / "weights.pt", load_model(), num_heads=4)
    with pytest.raises(ValueError, match=r"weights.pt does not say its dataset.*--data-dir"):
        probe(settings(ckpt=str(weights)))
    found = probed(settings(ckpt=str(weights), data_dir=str(data), times=(0.05,)))
    assert found["encoders"] == {} and found["model"]["step"] == 7


def load_model():
    """A model of the digits' sizes."""
    return checkpoints.sit(input_size=16, patch_size=4, in_channels=3, num_classes=10)


def test_results_lie_beside_the_checkpoints(settings, run, tmp_path):
    loaded = load(run / "checkpoints" / "0000003")
    assert settings(out="").output_folder(loaded, "probe") == run / "probe-0000003"
    assert (run / "probe-0000003").is_dir()
    weights = checkpoints.official(tmp_path / "weights.pt", load_model(), num_heads=4)
    found = settings(out="").output_folder(load(weights), "probe")
    assert found == tmp_path / "probe-0000007"
    out = tmp_path / "a" / "b"
    assert settings(out=str(out)).output_folder(loaded, "probe") == out and out.is_dir()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ckpt": "absent"}, "absent does not exist"),
        ({"data_dir": "absent"}, "no dataset at absent"),
        ({"layers": (4,)}, "block is 4, expected 1..3"),
        ({"times": (0.5, 1.5)}, "t is 1.5, expected a time in"),
        ({"encoders": "vgg"}, "encoder.*vgg"),
        ({"encoders": "dinov2-vit-b"}, "dinov2-vit-b: resolution is 16"),
        ({"enc_weights": "a.pth,b.pth"}, "enc_weights has 2 entries"),
    ],
)
def test_what_does_not_fit_is_named(settings, monkeypatch, tmp_path, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        probe(settings(cache="", **changes))
    assert not (tmp_path / "out").exists()


def test_the_cache_is_in_the_home_folder():
    assert ProbeConfig(ckpt="run").cache == str(CACHE)


def test_the_picture_shows_the_values(settings, tmp_path):
    """Other values, other pixels."""
    results = {"layers": [1, 2], "times": [0.1, 0.5], "encoders": {}}
    for name, top1 in (("a", [[0.1, 0.2], [0.3, 0.4]]), ("b", [[0.4, 0.2], [0.3, 0.1]])):
        module.plot(results | {"top1": top1}, tmp_path / f"{name}.png")
    module.plot(results | {"top1": top1, "encoders": {"vit": {"top1": 0.9}}}, tmp_path / "c.png")
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "abc"]
    assert not np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[1], pictures[2])
