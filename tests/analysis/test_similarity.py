"""`repa-fast cknna`: values of known features, checkpoint by checkpoint, and what is written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from repa_fast.analysis import similarity as module
from repa_fast.analysis.cknna import cka
from repa_fast.analysis.gather import gather
from repa_fast.analysis.hidden import Features
from repa_fast.analysis.similarity import VARIANTS, SimilarityConfig, compare, similarity, table
from repa_fast.data.dataset import LatentDataset
from repa_fast.eval.load import load
from repa_fast.eval.pictures import by_layer_and_time, over_points
from repa_fast.testing import seeded
from tests.analysis.analysing import assert_picture, cknna, coloured, write_table
from tests.eval import checkpoints

CPU = torch.device("cpu")
QUANTITIES = ("paper", "paper, normalised", "platonic", "platonic, normalised", "cka")
TRAIN, VAL = 30, 40


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_table(folder / "train.lance", *coloured(TRAIN, seed=0))
    write_table(folder / "val.lance", *coloured(VAL, seed=1))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    return checkpoints.run(tmp_path_factory.mktemp("run"), steps=(3, 7), data_dir=str(data))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def settings(run, cache, tmp_path):
    def make(**changes) -> SimilarityConfig:
        fields = {
            "ckpt": str(run), "times": (0.1, 0.5), "cache": cache, "out": str(tmp_path / "out"),
            "num_workers": 1, "k": 4,
        }  # fmt: skip
        return SimilarityConfig(**fields | changes)

    return make


def compared(config: SimilarityConfig) -> dict:
    """What `similarity` writes."""
    said, out = similarity(config), Path(config.out)
    results = json.loads((out / "cknna.json").read_text())
    assert said == f"{table(results, config.plotted)}\n\n{out / 'cknna.png'}"
    assert_picture(out / "cknna.png")
    return results


def made_up(rows: int = 20) -> Features:
    """Two times and three blocks; block 2 at the second time is the encoder's features."""
    tokens, hidden = seeded((rows, 6), seed=1), seeded((2, 3, rows, 6), seed=2)
    hidden[1, 1] = tokens
    return Features(hidden, torch.zeros(rows, dtype=torch.int64), {"vit": tokens})


def test_definitions_and_normalisations_have_names():
    assert (*VARIANTS, "cka") == QUANTITIES


@pytest.mark.parametrize("variant", QUANTITIES)
def test_features_are_like_themselves(variant):
    values = np.array(compare(made_up(), "vit", [1, 2, 3], 4, CPU)[variant])
    assert values.shape == (2, 3)
    assert values[1, 1] == pytest.approx(1, abs=1e-9)
    values[1, 1] = -1
    assert values.max() < 0.9


def test_every_value_is_that_of_the_pair():
    gathered = made_up()
    values = compare(gathered, "vit", [1, 2, 3], 4, CPU)
    for t, of_time in enumerate(gathered.hidden):
        for layer, hidden in enumerate(of_time):
            arguments = (hidden, gathered.tokens["vit"])
            assert values["cka"][t][layer] == pytest.approx(cka(*arguments), rel=1e-12)
            for name, (definition, normalize) in VARIANTS.items():
                expected = cknna(*arguments, 4, definition=definition, normalize=normalize)
                assert values[name][t][layer] == pytest.approx(expected, rel=1e-12)


def test_a_layer_is_called_by_its_number():
    gathered = made_up()
    gathered.hidden[0, 1] = 1.0
    with pytest.raises(ValueError, match="rows of layer 7 are equal"):
        compare(gathered, "vit", [2, 7, 9], 4, CPU)


def test_an_encoder_of_the_run_and_the_held_out_images(settings, run, data):
    results = compared(settings())
    [found] = results["checkpoints"]
    loaded = load(run)
    assert found | {"values": {}} == {
        "source": str(run / "checkpoints" / "0000007"),
        "step": 7,
        "digest": loaded.digest,
        "images": VAL,
        "values": {},
    }
    assert results["layers"] == [1, 2, 3] and results["times"] == [0.1, 0.5]
    assert results["k"] == results["settings"]["k"] == 4
    assert list(found["values"]) == ["digits-vit"]
    values = found["values"]["digits-vit"]
    assert tuple(values) == QUANTITIES
    assert {np.shape(of) for of in values.values()} == {(2, 3)}
    gathered = gather(
        loaded, LatentDataset(data, "val"), np.arange(VAL), ["digits-vit"], settings(cache=""), CPU
    )
    expected = compare(gathered, "digits-vit", [1, 2, 3], 4, CPU)
    for name in QUANTITIES:
        assert np.allclose(values[name], expected[name], rtol=0, atol=1e-4), name


@pytest.mark.parametrize("count, images", [(10, 10), (10_000, VAL)])
def test_so_many_images(settings, count, images):
    results = compared(settings(count=count, times=(0.1,)))
    assert results["checkpoints"][0]["images"] == images


def test_some_layers_are_a_slice_of_all(settings):
    whole, some = compared(settings()), compared(settings(layers=(3, 1)))
    assert some["layers"] == [3, 1]
    of_all, of_some = (r["checkpoints"][0]["values"]["digits-vit"] for r in (whole, some))
    for name in QUANTITIES:
        assert np.array_equal(np.array(of_some[name]), np.array(of_all[name])[:, [2, 0]])


def test_every_checkpoint_of_a_run(settings, run, tmp_path):
    results = compared(settings(all_steps=True))
    assert [of["step"] for of in results["checkpoints"]] == [3, 7]
    assert_picture(tmp_path / "out" / "cknna-steps.png")
    digests = [load(run / "checkpoints" / f"{step:07d}").digest for step in (3, 7)]
    assert [of["digest"] for of in results["checkpoints"]] == digests
    for number, step in enumerate((3, 7)):
        ckpt = str(run / "checkpoints" / f"{step:07d}")
        alone = compared(settings(ckpt=ckpt, out=str(tmp_path / str(step))))
        assert alone["checkpoints"] == [results["checkpoints"][number]]
        assert not (tmp_path / str(step) / "cknna-steps.png").exists()


def test_results_lie_in_the_run(settings, run):
    similarity(settings(out=""))
    assert {p.name for p in (run / "cknna-0000007").iterdir()} == {"cknna.json", "cknna.png"}


def made_up_results() -> dict:
    """Of one checkpoint and one encoder."""
    values = compare(made_up(), "vit", [1, 2, 3], 4, CPU)
    found = {"step": 7, "images": 20, "values": {"vit": values}}
    return {"layers": [1, 2, 3], "times": [0.1, 0.5], "k": 4, "checkpoints": [found]}


def test_another_quantity_can_be_plotted(settings):
    compared(settings(plotted="cka"))


@pytest.mark.parametrize("plotted", QUANTITIES)
def test_the_table_has_what_is_plotted(plotted):
    results = made_up_results()
    values = results["checkpoints"][0]["values"]["vit"]
    lines = table(results, plotted).splitlines()
    assert lines[0] == f"{plotted}, with vit, 20 images, k = 4:"
    assert lines[2] == "| layer | t = 0.1 | t = 0.5 |"
    for line, layer, one, other in zip(lines[4:7], (1, 2, 3), *values[plotted], strict=True):
        assert line == f"| {layer} | {one:.3f} | {other:.3f} |"
    for name in QUANTITIES:
        assert f"{name} {np.max(values[name]):.3f}" in lines[-1]


def test_tables_of_two_encoders_are_apart():
    results = made_up_results()
    [found] = results["checkpoints"]
    found["values"]["other"] = found["values"]["vit"]
    lines = table(results, "cka").splitlines()
    second = lines.index("cka, with other, 20 images, k = 4:")
    assert lines[second - 1] == "" and lines[second - 2].startswith("largest")
    assert lines[-1].startswith("largest")


def test_each_encoder_has_its_picture(tmp_path):
    results = made_up_results()
    [found] = results["checkpoints"]
    found["values"]["other"] = found["values"]["vit"]
    results["checkpoints"] = [found | {"step": step} for step in (1, 2)]
    module._plot(results, "cka", tmp_path)
    names = {"cknna.png", "cknna-other.png", "cknna-steps.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in names:
        assert_picture(tmp_path / name)


def test_pictures(tmp_path):
    for count in (1, 9):  # of times and blocks; nine lines are too many on the right
        values = np.random.default_rng(0).random((count, count))
        numbers = list(range(1, count + 1))
        times = np.linspace(0, 1, count)
        by_layer_and_time(values, numbers, times, "value", {"vit": 0.5}, tmp_path / "a.png")
        assert_picture(tmp_path / "a.png")
    over_points({"vit": [(1, 0.1), (5, 0.3)]}, "step", "value", tmp_path / "b.png")
    assert_picture(tmp_path / "b.png")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"plotted": "paper,normalised"}, "plotted is 'paper,normalised', expected one of paper"),
        ({"encoders": "none"}, "no encoder to compare with, expected --encoders"),
        ({"k": VAL}, f"k is {VAL}, expected 1 <= k < {VAL}"),
        ({"k": 0}, "k is 0"),
        ({"ckpt": "absent"}, "absent does not exist"),
        ({"ckpt": "absent", "all_steps": True}, "absent is neither a complete checkpoint nor"),
        ({"layers": (9,)}, "block is 9, expected 1..3"),
        ({"data_dir": "absent"}, "no dataset at absent"),
    ],
)
def test_what_does_not_fit_is_named(settings, monkeypatch, tmp_path, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        similarity(settings(**changes))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_no_run_of_many(settings, run):
    with pytest.raises(ValueError, match="0000007 is neither a complete checkpoint nor"):
        similarity(settings(ckpt=str(run / "checkpoints" / "0000007"), all_steps=True))
