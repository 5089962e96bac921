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


def compared(config: SimilarityConfig) -> dict:
    """What `similarity` writes."""
    said, out = similarity(config), Path(config.out)
    results = json.loads((out / "cknna.json").read_text())
    assert said == f"{table(results, config.plotted)}\n\n{out / 'cknna.png'}"
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


def test_an_encoder_of_the_run_and_the_held_out_images(settings, loaded, data, tmp_path):
    results, out = compared(settings()), tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"cknna.json", "cknna.png"}
    assert_picture(out / "cknna.png")
    [found] = results["checkpoints"]
    values = found.pop("values")["digits-vit"]
    model = {"source": str(loaded.source), "step": 7, "weights": "ema"}
    assert found == model | {"digest": loaded.digest, "images": VAL}
    assert results["layers"] == [1, 2, 3] and results["times"] == [0.1, 0.5]
    assert results["k"] == results["settings"]["k"] == 4
    assert tuple(values) == QUANTITIES and {np.shape(of) for of in values.values()} == {(2, 3)}
    gathered = gather(
        loaded, LatentDataset(data, "val"), np.arange(VAL), ["digits-vit"], settings(cache=""), CPU
    )
    expected = compare(gathered, "digits-vit", [1, 2, 3], 4, CPU)
    for name in QUANTITIES:
        assert np.allclose(values[name], expected[name], rtol=0, atol=1e-4), name


def test_every_checkpoint_of_a_run_by_so_many_images_and_some_layers(settings, run, undrawn):
    """Of which another quantity is plotted."""
    results = compared(settings(all_steps=True, count=10, layers=(3, 1), plotted="cka"))
    assert [of["step"] for of in results["checkpoints"]] == [3, 7] and results["layers"] == [3, 1]
    assert [of["images"] for of in results["checkpoints"]] == [10, 10]
    folders = [run / "checkpoints" / f"{step:07d}" for step in (3, 7)]
    assert [of["digest"] for of in results["checkpoints"]] == [load(of).digest for of in folders]
    [of_one] = compared(settings(ckpt=str(folders[0]), count=10))["checkpoints"]
    of_all, of_some = (of["values"]["digits-vit"] for of in (of_one, results["checkpoints"][0]))
    for name in QUANTITIES:
        assert np.array_equal(np.array(of_some[name]), np.array(of_all[name])[:, [2, 0]])


def test_results_lie_in_the_run_where_no_folder_is_said(settings, run, undrawn):
    assert similarity(settings(out="")).endswith(str(run / "cknna-0000007" / "cknna.png"))
    assert (run / "cknna-0000007" / "cknna.json").exists()


@pytest.mark.parametrize("plotted", ["cka", "platonic, normalised"])
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


@pytest.mark.parametrize("changes, message", [
    ({"plotted": "paper,normalised"}, "plotted is 'paper,normalised', expected one of paper"),
    ({"encoders": "none"}, "no encoder to compare with, expected --encoders"),
    ({"k": VAL}, f"k is {VAL}, expected 1 <= k < {VAL}"),
    ({"ckpt": "absent", "all_steps": True}, "absent is neither a complete checkpoint nor"),
    ({"ckpt": "0000007", "all_steps": True}, "0000007 is neither a complete checkpoint nor"),
])  # fmt: skip
def test_what_does_not_fit_is_named(settings, monkeypatch, run, tmp_path, changes, message):
    monkeypatch.chdir(run / "checkpoints")
    refused(lambda: similarity(settings(**changes)), message)
    assert not (tmp_path / "out").exists()
