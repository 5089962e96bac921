import json

import pytest
import torch

from repa_fast.eval.info import InfoConfig, info
from repa_fast.models.sit import SiT
from tests.eval import checkpoints
from tests.refusals import refused


def described(path) -> str:
    return info(InfoConfig(path=str(path)))


def test_a_weight_file_is_named_with_its_model(tmp_path):
    with torch.device("meta"):
        model = SiT(depth=12, hidden_size=384, num_heads=6, z_dims=(768,), num_classes=1000)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    torch.save({name: torch.zeros(1).expand(s) for name, s in shapes.items()}, tmp_path / "last.pt")
    text = described(tmp_path / "last.pt")
    assert "bare weights" in text and "SiT-S/2" in text and "projectors to 768" in text
    assert "39.5 M parameters" in text


def test_an_official_file_lists_its_parts(tmp_path):
    state = SiT(depth=1, hidden_size=32, num_heads=2, encoder_depth=1, z_dims=()).state_dict()
    torch.save({"model": state, "ema": state, "opt": {}, "steps": 5}, tmp_path / "x.pt")
    text = described(tmp_path / "x.pt")
    assert "official checkpoint with model, ema, opt, steps, step 5" in text
    assert "depth 1, width 32" in text and "no projector" in text


def test_counters_of_an_earlier_version_and_odd_names_are_no_matter(tmp_path):
    run = checkpoints.run(tmp_path, exp_name="a\n\x1b[31mb")
    counters = run / "checkpoints" / "0000007" / "counters.json"
    values = json.loads(counters.read_text())
    del values["world_size"]
    counters.write_text(json.dumps(values))
    text = info(InfoConfig(path=str(run), verify=False))
    assert "run a ?[31mb, data" in text and "written by ? processes\n" in text


def test_of_a_run_its_checkpoints_weights_and_records_are_said(tmp_path):
    run = checkpoints.run(tmp_path / "a", steps=(3, 7), ema_decay="0.9999,0.5", exp_name="one")
    (run / "metrics.jsonl").write_text('{"step": 7, "loss": 0.25, "images_per_second": 57.21}\n')
    newest = run / "checkpoints" / "0000007"
    head, weights, copies, name, *rest = described(run).splitlines()
    assert head == f"{newest}: native checkpoint of step 7" and "depth 3, width 32" in weights
    assert copies == "weights: model, ema (decay 0.9999), ema_2 (decay 0.5)"
    assert name == "run one, data digits, encoders digits-vit, written by 1 processes"
    assert rest == ["checkpoints of steps 3, 7", "metrics at step 7: loss 0.25, 57.2 images/s"]
    assert described(newest).splitlines() == [head, weights, copies, name]
    assert described(newest.parent).splitlines() == [head, weights, copies, name, rest[0]]
    refused(lambda: info(InfoConfig(path=str(run), sheet="x.png")), "x.png, but .* is no dataset")


def test_a_run_without_a_checkpoint_is_one(tmp_path):
    (tmp_path / "args.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("{")
    head, damaged = described(tmp_path).splitlines()
    assert head == f"{tmp_path}: run without a complete checkpoint"
    assert damaged.startswith("metrics.jsonl is left out: it is damaged")


def test_what_is_nothing_is_an_error(tmp_path):
    refused(lambda: described(tmp_path / "nothing"), "does not exist")
    pytest.importorskip("lance")
    refused(lambda: described(tmp_path), "no dataset at")
