import json
import logging

import pytest
import torch

from repa_fast import cli
from repa_fast.checkpoint import formats
from repa_fast.checkpoint.export import export, file_beside, format_of
from repa_fast.models.sit import SiT
from repa_fast.train import checkpoint
from repa_fast.train.resume import resume, start_from
from repa_fast.train.step import accumulate, draw_local, synthetic_batch, train_step


@pytest.fixture
def trained(make_state, tmp_path):
    """(state after 3 steps, its batch, folder with checkpoints of steps 1, 2, 3)."""
    state = make_state()
    batch, _ = synthetic_batch(state, 12)
    for _ in range(3):
        train_step(state, batch)
        checkpoint.save(tmp_path, state)
    return state, batch, tmp_path


def weights(state) -> list[torch.Tensor]:
    tensors = [*state.model.state_dict().values(), *state.ema.state_dict().values()]
    for values in state.optimizer.state_dict()["state"].values():
        tensors += values.values()
    return tensors


def assert_same(a, b) -> None:
    assert len(weights(a)) == len(weights(b))
    assert all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def official_file(state, folder, name="0000003.pt"):
    export(checkpoint.path_of(folder, state.step), "official", folder / "official" / name)
    return folder / "official" / name


def test_official_file_has_the_official_structure(trained):
    state, _, folder = trained
    contents = formats.read_file(official_file(state, folder))
    assert list(contents) == ["model", "ema", "opt", "args", "steps"]
    assert contents["steps"] == 3 and contents["args"].learning_rate == 2e-3
    names = [name for name, _ in state.model.named_parameters()]
    assert names[0] == "pos_embed" and 0 not in contents["opt"]["state"]
    assert contents["opt"]["param_groups"][0]["params"] == list(range(len(names)))
    index = names.index("blocks.1.mlp.fc1.weight")
    moment = state.optimizer.state[dict(state.model.named_parameters())[names[index]]]["exp_avg"]
    assert torch.equal(contents["opt"]["state"][index]["exp_avg"], moment)
    assert contents["model"].keys() == contents["ema"].keys() == state.model.state_dict().keys()


def test_official_to_ours_to_official_is_bit_equal(trained, make_state):
    state, _, folder = trained
    first = official_file(state, folder)
    other = make_state(resume=str(first))
    assert resume(folder / "none", other) == first
    checkpoint.save(folder / "other", other)
    second = official_file(other, folder / "other")
    a, b = formats.read_file(first), formats.read_file(second)
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])
    assert a["steps"] == b["steps"]
    assert a["opt"]["state"].keys() == b["opt"]["state"].keys()
    for index, values in a["opt"]["state"].items():
        assert all(torch.equal(values[key], b["opt"]["state"][index][key]) for key in values)


def test_training_goes_on_from_an_official_file_as_plain_torch_does(trained, make_state):
    """Three further steps: ours, against torch's AdamW fed the same gradients."""
    state, batch, folder = trained
    path = official_file(state, folder)
    ours = make_state(resume=str(path))
    resume(folder / "none", ours)
    assert_same(ours, state)

    contents = formats.read_file(path)
    plain = make_state()
    plain.model.load_state_dict(contents["model"])
    optimizer = torch.optim.AdamW(plain.model.parameters(), lr=2e-3)
    optimizer.load_state_dict(contents["opt"])
    plain.step = contents["steps"]
    for _ in range(3):
        optimizer.zero_grad()
        accumulate(plain, batch, draw_local(plain))
        torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 1.0)
        optimizer.step()
        plain.step += 1
        train_step(ours, batch)
    for a, b in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=2e-6)


def test_auto_takes_the_newest(trained, make_state):
    state, _, folder = trained
    other = make_state(resume="auto")
    assert resume(folder, other) == checkpoint.path_of(folder, 3)
    assert_same(other, state)


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    trained, make_state, caplog, harm
):
    _, _, folder = trained
    shard = next(checkpoint.path_of(folder, 3).glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "remove":
        shard.unlink()
    else:
        shard.write_bytes(content if harm == "flip" else content[:-100])
    other = make_state(resume="auto")
    with caplog.at_level(logging.WARNING):
        assert resume(folder, other) == checkpoint.path_of(folder, 2)
    assert other.step == 2
    assert "passing over" in caplog.text and shard.name in caplog.text
    with pytest.raises(ValueError, match=r"0000003 is damaged: .*distcp"):
        resume(folder, make_state(resume="3"))


def test_a_damaged_checkpoint_is_written_again_when_its_step_comes(trained, make_state):
    _, batch, folder = trained
    target = checkpoint.path_of(folder, 3)
    with open(target / "__0_0.distcp", "ab") as shard:
        shard.truncate(1000)
    other = make_state(resume="auto")
    resume(folder, other)
    assert other.step == 2
    train_step(other, batch)
    assert checkpoint.save(folder, other) == target
    again = make_state(resume="auto")
    assert resume(folder, again) == target
    assert_same(again, other)


def test_all_damaged_is_an_error_not_a_new_run(trained, make_state):
    _, _, folder = trained
    for step in (1, 2, 3):
        (checkpoint.path_of(folder, step) / "counters.json").write_text("{}")
    with pytest.raises(ValueError, match=r"all checkpoints in .* are damaged"):
        resume(folder, make_state(resume="auto"))


def test_a_step_a_directory_and_a_run_can_be_named(trained, make_state):
    _, _, folder = trained
    (folder / "run").mkdir()
    (folder / "run" / "checkpoints").symlink_to(folder)
    for wanted, step in (("2", 2), (str(folder / "0000001"), 1), (str(folder / "run"), 3)):
        other = make_state(resume=wanted)
        resume(folder, other)
        assert other.step == step
    with pytest.raises(
        ValueError, match=r"no complete checkpoint of step 9.*found: 0000003, 0000002"
    ):
        resume(folder, make_state(resume="9"))
    with pytest.raises(ValueError, match=r"resume is 'nowhere', expected auto, never, a step"):
        resume(folder, make_state(resume="nowhere"))


def test_upstreams_resume_step_finds_the_official_file(trained, make_state, tmp_path):
    state, _, folder = trained
    other = make_state(resume_step=3)
    path = official_file(state, folder)
    assert resume(path.parent, other) == path
    assert_same(other, state)


def test_bare_weights_cannot_be_gone_on_from(trained, make_state, tmp_path):
    state, _, _ = trained
    torch.save(state.ema.state_dict(), tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"has no model, ema, opt, steps.*--init-from"):
        resume(tmp_path / "none", make_state(resume=str(tmp_path / "last.pt")))


def test_another_model_is_refused_with_what_differs(trained, make_state):
    _, _, folder = trained
    with pytest.raises(ValueError, match=r"holds a SiT \(depth 3.*model is a SiT \(depth 2"):
        resume(folder, make_state(resume="auto", depth=2))


def test_start_from_sets_model_and_average(trained, make_state):
    state, _, folder = trained
    other = make_state(depth=3, num_classes=12)
    notes = start_from(checkpoint.path_of(folder, 3), "repa", other)
    assert len(notes) == 1 and "12 classes" in notes[0]
    assert other.step == 0
    expected = state.ema.state_dict()
    for model in (other.model, other.ema):
        for name, tensor in model.state_dict().items():
            assert name == formats.LABELS or torch.equal(tensor, expected[name])


def test_pruning_keeps_the_last_and_every_nth(make_state, tmp_path):
    state = make_state(keep_last=2, keep_every=4)
    for step in range(1, 8):
        state.step = step
        checkpoint.save(tmp_path, state)
    assert checkpoint.steps(tmp_path) == [4, 6, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000004", "0000006", "0000007"]


def test_export_refuses_to_overwrite_and_leaves_nothing_half_written(trained, monkeypatch):
    state, _, folder = trained
    path = official_file(state, folder)
    with pytest.raises(ValueError, match="exists already"):
        export(checkpoint.path_of(folder, 3), "official", path)
    with pytest.raises(ValueError, match="format is 'gguf', expected one of official, sra, saf"):
        export(checkpoint.path_of(folder, 3), "gguf", folder / "x")
    (checkpoint.path_of(folder, 2) / checkpoint.MARKER).unlink()
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        export(checkpoint.path_of(folder, 2), "official", folder / "y.pt")
    assert not list(folder.glob("*y.pt*"))


def test_safetensors_export_is_the_average_with_its_arguments(trained):
    state, _, folder = trained
    out = folder / "model.safetensors"
    export(checkpoint.path_of(folder, 3), "safetensors", out)
    described = json.loads(out.with_suffix(".json").read_text())
    model = SiT(**described["model"])
    formats.load_exactly(model, formats.read_weights(out), str(out))
    for name, tensor in state.ema.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert described["dataset"]["latent_shape"] == [3, 16, 16]


SRA = {"align": "sra", "block_out_s": 1, "block_out_t": 3}


def test_sras_file_has_its_keys_and_goes_on_bit_for_bit(make_state, tmp_path):
    state = make_state(**SRA)
    batch, _ = synthetic_batch(state, 12)
    train_step(state, batch)
    state.step = 500_000
    target = checkpoint.save(tmp_path, state)
    assert cli.main(["export", str(target), "--out", str(tmp_path / "step-500000.pt")]) == 0
    contents = formats.read_file(tmp_path / "step-500000.pt")
    assert contents.keys() == {"model", "ema", "opt", "args", "epoch", "steps"}
    # 500,000 steps of 12 images over the 1,281,167 of ImageNet are 4.7 epochs.
    assert (contents["epoch"], contents["steps"]) == (4, 500_000)
    names = set(state.model.state_dict())
    assert contents["model"].keys() == contents["ema"].keys() == names
    assert {"ap_head.linear1.weight", "ap_head.linear2.bias"} <= names
    assert not any(name.startswith("projectors.") for name in names)
    other = make_state(**SRA, seed=5, resume=str(tmp_path / "step-500000.pt"))
    resume(tmp_path / "none", other)
    assert_same(other, state)
    assert other.step == 500_000
    head = {name for name in names if name.startswith("ap_head.")}
    assert formats.read_weights(tmp_path / "step-500000.pt").keys() == names - head


def test_a_run_with_projectors_is_no_sra_file(trained):
    _, _, folder = trained
    with pytest.raises(ValueError, match=r"0000003 is of a run with --align repa, expected sra"):
        export(checkpoint.path_of(folder, 3), "sra", folder / "step-3.pt")
    assert not list(folder.glob("*step-3*"))


@pytest.mark.parametrize(
    "name, to",
    [
        ("0000003.pt", "official"),
        ("x.safetensors", "safetensors"),
        ("step-3.pt", "sra"),
        ("epoch-12.pt", "sra"),
        ("step-3.safetensors", "safetensors"),
        ("my-step-3.pt", "official"),
    ],
)
def test_the_format_follows_the_name_and_the_name_the_format(trained, name, to):
    _, _, folder = trained
    assert format_of(folder / name) == to
    default = file_beside(checkpoint.path_of(folder, 3), to)
    assert default.parent == folder and format_of(default) == to and "3" in default.name
