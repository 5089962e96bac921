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
from repa_fast.eval.pictures import by_layer_and_time
from repa_fast.testing import seeded
from tests.analysis.analysing import VAL, assert_picture, cknna
from tests.refusals import refused

CPU = torch.device("cpu")
QUANTITIES = ("paper", "paper, normalised", "platonic", "platonic, normalised", "cka")


@pytest.fixture
def settings(fields):
    def make(**changes) -> SimilarityConfig:
        return SimilarityConfig(**fields | {"times": (0.1, 0.5), "k": 4} | changes)

    return make


def compared(config: SimilarityConfig, out: Path) -> dict:
    """What `similarity` writes into a folder."""
    said = similarity(config)
    results = json.loads((out / "cknna.json").read_text())
    assert said == f"{table(results, config.plotted)}\n\n{out / 'cknna.png'}"
    assert_picture(out / "cknna.png")
    return results


def made_up(rows: int = 20) -> Features:
    """Two times and three blocks; block 2 at the second time is the encoder's features."""
    tokens, hidden = seeded((rows, 6), seed=1), seeded((2, 3, rows, 6), seed=2)
    hidden[1, 1] = tokens
    return Features(hidden, torch.zeros(rows, dtype=torch.int64), {"vit": tokens})


def made_up_results(*names: str) -> dict:
    """Of one checkpoint and some encoders."""
    values = compare(made_up(), "vit", [1, 2, 3], 4, CPU)
    found = {"step": 7, "images": 20, "values": dict.fromkeys(names, values)}
    return {"layers": [1, 2, 3], "times": [0.1, 0.5], "k": 4, "checkpoints": [found]}


def test_every_value_is_that_of_the_pair():
    gathered = made_up()
    values = compare(gathered, "vit", [1, 2, 3], 4, CPU)
    assert tuple(values) == (*VARIANTS, "cka") == QUANTITIES
    for of_times in values.values():
        alike = [value > 0.9 for of_time in of_times for value in of_time]
        assert alike == [False, False, False, False, True, False]
        assert of_times[1][1] == pytest.approx(1, abs=1e-9)
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
    words = "rows of layer 7 are equal"
    refused(lambda: compare(gathered, "vit", [2, 7, 9], 4, CPU), words)


def test_an_encoder_of_the_run_and_the_held_out_images(settings, run, loaded, data):
    """Where no folder is said, in the run."""
    out = run / "cknna-0000007"
    results = compared(settings(out=""), out)
    assert {p.name for p in out.iterdir()} == {"cknna.json", "cknna.png"}
    [found] = results["checkpoints"]
    assert found | {"values": {}} == {
        "source": str(loaded.source), "step": 7, "digest": loaded.digest, "images": VAL,
        "values": {},
    }  # fmt: skip
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


def test_every_checkpoint_of_a_run_by_so_many_images(settings, run, tmp_path):
    out, alone = tmp_path / "out", tmp_path / "alone"
    results = compared(settings(all_steps=True, count=10), out)
    assert [of["step"] for of in results["checkpoints"]] == [3, 7]
    assert [of["images"] for of in results["checkpoints"]] == [10, 10]
    assert_picture(out / "cknna-steps.png")
    folders = [run / "checkpoints" / f"{step:07d}" for step in (3, 7)]
    assert [of["digest"] for of in results["checkpoints"]] == [load(of).digest for of in folders]
    of_one = compared(settings(ckpt=str(folders[0]), out=str(alone), count=10), alone)
    assert of_one["checkpoints"] == results["checkpoints"][:1]
    assert not (alone / "cknna-steps.png").exists()


def test_some_layers_are_a_slice_of_all_and_another_quantity_can_be_plotted(settings, tmp_path):
    whole, some = (
        compared(settings(**changes), tmp_path / "out")
        for changes in ({"plotted": "cka"}, {"layers": (3, 1)})
    )
    assert some["layers"] == [3, 1]
    of_all, of_some = (r["checkpoints"][0]["values"]["digits-vit"] for r in (whole, some))
    for name in QUANTITIES:
        assert np.array_equal(np.array(of_some[name]), np.array(of_all[name])[:, [2, 0]])


@pytest.mark.parametrize("plotted", QUANTITIES)
def test_the_table_has_what_is_plotted(plotted):
    results = made_up_results("vit")
    values = results["checkpoints"][0]["values"]["vit"]
    lines = table(results, plotted).splitlines()
    assert lines[0] == f"{plotted}, with vit, 20 images, k = 4:"
    assert lines[2] == "| layer | t = 0.1 | t = 0.5 |"
    for line, layer, one, other in zip(lines[4:7], (1, 2, 3), *values[plotted], strict=True):
        assert line == f"| {layer} | {one:.3f} | {other:.3f} |"
    for name in QUANTITIES:
        assert f"{name} {np.max(values[name]):.3f}" in lines[-1]


def test_each_encoder_has_its_table_and_picture(tmp_path):
    results = made_up_results("vit", "other")
    lines = table(results, "cka").splitlines()
    second = lines.index("cka, with other, 20 images, k = 4:")
    assert lines[second - 1] == "" and lines[second - 2].startswith("largest")
    assert lines[-1].startswith("largest")
    [found] = results["checkpoints"]
    results["checkpoints"] = [found | {"step": step} for step in (1, 2)]
    module._plot(results, "cka", tmp_path)
    names = {"cknna.png", "cknna-other.png", "cknna-steps.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in names:
        assert_picture(tmp_path / name)


def test_pictures_of_few_lines_and_of_too_many_for_the_right(tmp_path):
    for count in (1, 9):  # of times and blocks
        values = np.random.default_rng(0).random((count, count))
        numbers, times = list(range(1, count + 1)), np.linspace(0, 1, count)
        by_layer_and_time(values, numbers, times, "value", {"vit": 0.5}, tmp_path / "a.png")
        assert_picture(tmp_path / "a.png")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"plotted": "paper,normalised"}, "plotted is 'paper,normalised', expected one of paper"),
        ({"encoders": "none"}, "no encoder to compare with, expected --encoders"),
        ({"k": VAL}, f"k is {VAL}, expected 1 <= k < {VAL}"),
        ({"k": 0}, "k is 0"),
        ({"ckpt": "absent"}, "absent does not exist"),
        ({"ckpt": "absent", "all_steps": True}, "absent is neither a complete checkpoint nor"),
        ({"ckpt": "0000007", "all_steps": True}, "0000007 is neither a complete checkpoint nor"),
        ({"layers": (9,)}, "block is 9, expected 1..3"),
        ({"data_dir": "absent"}, "no dataset at absent"),
    ],
)
def test_what_does_not_fit_is_named(settings, monkeypatch, run, tmp_path, changes, message):
    monkeypatch.chdir(run / "checkpoints")
    refused(lambda: similarity(settings(**changes)), message)
    assert not (tmp_path / "out").exists()
