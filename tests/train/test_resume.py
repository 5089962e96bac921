"""Where a run goes on from, and the files for other programs that it can go on from."""

import json
import logging
import shutil
from functools import partial

import pytest
import torch

from repa_fast import cli
from repa_fast.checkpoint import formats
from repa_fast.checkpoint.export import export, file_beside, format_of
from repa_fast.checkpoint.layout import load_weights
from repa_fast.checkpoint.marker import MARKER, trusted
from repa_fast.failure import Failure
from repa_fast.train import checkpoint
from repa_fast.train.resume import start_from
from repa_fast.train.step import accumulate, draw_local, synthetic_batch, train_step
from tests.refusals import refused
from tests.train.conftest import assert_same, resumed, tiny_state
from tests.train.runs import assert_same_state, assert_same_weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(state after 3 steps, its batch, folder with checkpoints of steps 1, 2, 3), not changed."""
    state, folder = tiny_state(), tmp_path_factory.mktemp("trained")
    batch, _ = synthetic_batch(state, 12)
    for _ in range(3):
        train_step(state, batch)
        checkpoint.save(folder, state)
    export(checkpoint.path_of(folder, 3), "official", folder / "official" / "0000003.pt")
    return state, batch, folder


@pytest.fixture
def state(trained):
    """The state of the newest checkpoint."""
    return trained[0]


@pytest.fixture
def saved(trained):
    """The newest checkpoint, to read."""
    return checkpoint.path_of(trained[-1], 3)


@pytest.fixture
def official(trained):
    """The newest checkpoint as the official trainer would have saved it."""
    return trained[-1] / "official" / "0000003.pt"


@pytest.fixture
def folder(trained, tmp_path):
    """All checkpoints, to do anything with."""
    return shutil.copytree(trained[-1], tmp_path / "checkpoints")


def test_a_checkpoint_holds_the_config_over_which_flags_win(state, saved):
    assert json.loads((saved / "config.json").read_text()) == state.config.to_dict()
    other = tiny_state(learning_rate=1e-5)
    checkpoint.load(saved, other)
    assert other.optimizer.param_groups[0]["lr"] == 1e-5
    load_weights(saved, other.model)
    assert_same(other.model.state_dict().values(), state.ema.state_dict().values())


def test_official_file_has_the_official_structure(state, official):
    contents = formats.read_file(official)
    assert list(contents) == ["model", "ema", "opt", "args", "steps"]
    assert contents["steps"] == 3 and contents["args"].learning_rate == 2e-3
    names = [name for name, _ in state.model.named_parameters()]
    assert names[0] == "pos_embed" and 0 not in contents["opt"]["state"]
    assert contents["opt"]["param_groups"][0]["params"] == list(range(len(names)))
    index = names.index("blocks.1.mlp.fc1.weight")
    moment = state.optimizer.state[dict(state.model.named_parameters())[names[index]]]["exp_avg"]
    assert torch.equal(contents["opt"]["state"][index]["exp_avg"], moment)
    assert contents["model"].keys() == contents["ema"].keys() == state.model.state_dict().keys()


def test_training_goes_on_from_an_official_file_as_plain_torch_does(trained, official, tmp_path):
    """Exported again it is the same; three steps on: ours, and AdamW fed the same gradients."""
    state, batch, _ = trained
    ours = tiny_state(resume=str(official))
    assert resumed(tmp_path / "none", ours) == official
    assert_same_weights(ours, state)
    export(checkpoint.save(tmp_path, ours), "official", tmp_path / "again.pt")
    contents, again = (formats.read_file(file) for file in (official, tmp_path / "again.pt"))
    for part in ("model", "ema"):
        torch.testing.assert_close(again[part], contents[part], rtol=0, atol=0)
    assert again["steps"] == contents["steps"]
    torch.testing.assert_close(again["opt"]["state"], contents["opt"]["state"], rtol=0, atol=0)

    plain = tiny_state()
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


def changed(key: str, change) -> dict:
    """(values of a parameter's state) -> those with one of them changed."""
    return lambda opt: opt["state"][3].update({key: change(opt["state"][3][key])})


STATES = {
    "it is {.*, expected AdamW's state and param_groups": lambda opt: opt.clear(),
    "it is {.*, expected AdamW's": lambda opt: opt.update(state=[1]),
    "its param_groups are none": lambda opt: opt.update(param_groups=[5]),
    "param_groups number 2 parameters, expected": lambda opt: opt.update(
        param_groups=[{"params": [0, 1]}]
    ),
    r"a state of parameter '1', expected 0\.\.": lambda opt: opt.update(
        state={str(number): values for number, values in opt["state"].items()}
    ),
    r"a state of parameter 9999, expected 0\.\.": lambda opt: opt["state"].update({9999: {}}),
    r"the state of x_embedder\.proj\.bias is 5, expected": lambda opt: opt["state"].update({2: 5}),
    r"it has no state of x_embedder\.proj\.bias, expected": lambda opt: opt["state"].pop(2),
    "it has no state of x_embedder.proj.weight": lambda opt: opt["state"].clear(),
    r"exp_avg of .* is \(1,\), expected": changed("exp_avg", lambda t: torch.zeros(1)),
    r"exp_avg of .* is \[a Tensor\], expected": changed("exp_avg", lambda t: [t]),
    "exp_avg_sq of .* is negative": changed("exp_avg_sq", lambda t: -torch.ones_like(t)),
    "exp_avg_sq has NaN or": changed("exp_avg_sq", lambda t: t / 0),
    "exp_avg has NaN or infinite": changed("exp_avg", lambda t: t * torch.nan),
    "exp_avg is of complex64": changed("exp_avg", lambda t: t + 1j),
    "exp_avg is sparse": changed("exp_avg", lambda t: t.to_sparse()),
    r"step of .* is \(2,\), expected \(\)": changed("step", lambda t: torch.tensor([1.0, 2.0])),
    "step of .* is nan, expected 0": changed("step", lambda t: t * torch.nan),
    "step of .* is -1.0, expected 0": changed("step", lambda t: torch.tensor(-1.0)),
    "step of .* is 1e[+]20": changed("step", lambda t: 1e20),
}


@pytest.mark.parametrize("words", STATES)
def test_an_optimizer_state_that_no_training_leaves_is_refused_and_nothing_loaded(
    official, tmp_path, words
):
    contents, path = formats.read_file(official), tmp_path / "0000003.pt"
    STATES[words](contents["opt"])
    torch.save(contents, path)
    other, fresh = tiny_state(resume=str(path), seed=5), tiny_state(seed=5)
    refused(partial(resumed, tmp_path, other), rf"0000003\.pt \[opt\]: .*{words}")
    assert_same_state(other, fresh)


def test_states_that_share_memory_with_each_other_or_repeat_it_are_copied(official, tmp_path):
    """Strides of 0 would be written over and over by AdamW, a shared one by two parameters."""
    contents, path = formats.read_file(official), tmp_path / "0000003.pt"
    state = contents["opt"]["state"]
    alike = [n for n in state if state[n]["exp_avg"].shape == (32,)][:2]
    state[alike[0]]["exp_avg"] = state[alike[1]]["exp_avg"] = torch.ones(()).expand(32)
    for values in state.values():
        values["step"] = int(values["step"])  # as torch saved it before 1.12
    torch.save(contents, path)
    other = tiny_state(resume=str(path))
    resumed(tmp_path, other)
    moments = [values["exp_avg"] for values in other.optimizer.state.values() if values]
    assert all(tensor.is_contiguous() for tensor in moments)
    assert len({tensor.data_ptr() for tensor in moments}) == len(moments) > 9
    assert {float(values["step"]) for values in other.optimizer.state.values() if values} == {3.0}


@pytest.mark.parametrize("key", ["model", "ema"])
def test_weights_that_are_not_finite_or_of_another_model_are_named_and_nothing_loaded(
    official, tmp_path, key
):
    contents, path = formats.read_file(official), tmp_path / "0000003.pt"
    other, fresh = tiny_state(resume=str(path), seed=5), tiny_state(seed=5)
    bias = "final_layer.linear.bias"
    for change, words in (
        ({bias: contents[key][bias] / 0}, f"{bias} has NaN or infinite"),
        ({"blocks.0.extra": torch.zeros(1)}, "it does not fit the model, it also has 1: blocks"),
    ):
        torch.save(contents | {key: contents[key] | change}, path)
        refused(partial(resumed, tmp_path, other), rf"0000003\.pt \[{key}\]: {words}")
        assert_same_state(other, fresh)


def test_a_folder_with_an_official_files_name_is_none(state, folder):
    (folder / "0000009.pt").mkdir()
    other = tiny_state(resume="auto")
    assert resumed(folder, other) == checkpoint.path_of(folder, 3)
    refused(partial(resumed, folder, tiny_state(resume="9")), "no complete checkpoint of step 9")


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_weights_of_another_model_than_the_config_says_are_not_exported(
    saved, tmp_path, name, depth
):
    source = shutil.copytree(saved, tmp_path / "0000003")
    values = json.loads((source / "config.json").read_text()) | {"depth": depth}
    (source / "config.json").write_text(json.dumps(values))
    words = "by its config.json does not fit the model, it .*blocks"
    with trusted():
        refused(lambda: export(source, format_of(tmp_path / name), tmp_path / name), words)
    assert [*tmp_path.iterdir()] == [source]


def test_a_step_a_directory_a_run_or_the_newest_can_be_named(state, folder):
    """A step also as upstream does, which finds the official file."""
    (folder / "run").mkdir()
    (folder / "run" / "checkpoints").symlink_to(folder)
    wanted = {"auto": 3, "2": 2, str(folder / "0000001"): 1, str(folder / "run"): 3}
    for name, step in wanted.items():
        other = tiny_state(resume=name)
        assert resumed(folder, other).samefile(checkpoint.path_of(folder, step))
        assert other.step == step
    assert_same_state(other, state)
    other = tiny_state(resume_step=3)
    assert resumed(folder / "official", other) == folder / "official" / "0000003.pt"
    assert_same_weights(other, state)


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(trained, folder, caplog, harm):
    """And written again when its step comes."""
    target = checkpoint.path_of(folder, 3)
    shard = target / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "remove":
        shard.unlink()
    else:
        shard.write_bytes(content if harm == "flip" else content[:-100])
    other, again, named = (tiny_state(resume=name) for name in ("auto", "auto", "3"))
    refused(partial(resumed, folder, named), r"0000003 is damaged: .*__0_0\.distcp")
    with caplog.at_level(logging.WARNING):
        assert resumed(folder, other) == checkpoint.path_of(folder, 2)
    assert other.step == 2
    assert "passing over" in caplog.text and shard.name in caplog.text
    assert checkpoint.steps(folder) == [1, 2]  # so that --keep-last does not count it
    aside = folder / "0000003.damaged" / shard.name
    assert aside.exists() == (harm != "remove")
    train_step(other, trained[1])
    assert checkpoint.save(folder, other) == target
    assert resumed(folder, again) == target
    assert_same_state(again, other)


def test_all_damaged_is_an_error_not_a_new_run(folder):
    for step in (1, 2, 3):
        (checkpoint.path_of(folder, step) / "counters.json").write_text("{}")
    words = r"all checkpoints in .* are damaged"
    refused(partial(resumed, folder, tiny_state(resume="auto")), words)


def test_another_model_is_refused_with_what_differs(saved):
    with pytest.raises(ValueError, match=r"holds a SiT \(depth 3.*model is a SiT \(depth 2"):
        resumed(saved.parent, tiny_state(resume="auto", depth=2))


def test_what_is_not_there_and_bare_weights_cannot_be_gone_on_from(state, saved, tmp_path):
    torch.save(state.ema.state_dict(), tmp_path / "last.pt")
    for name, words in (
        ("9", r"no complete checkpoint of step 9.*found: 0000003, 0000002"),
        ("nowhere", r"resume is 'nowhere', expected auto, never, a step"),
        (str(tmp_path / "last.pt"), r"has no model, ema, opt, steps.*--init-from"),
    ):
        refused(partial(resumed, saved.parent, tiny_state(resume=name)), words)


def test_start_from_sets_model_and_average(state, saved):
    other = tiny_state(depth=3, num_classes=12)
    notes = start_from(saved, "repa", other)
    assert len(notes) == 1 and "12 classes" in notes[0]
    assert other.step == 0
    expected = state.ema.state_dict()
    for model in (other.model, other.ema):
        for name, tensor in model.state_dict().items():
            assert name == formats.LABELS or torch.equal(tensor, expected[name])


def test_export_refuses_and_leaves_nothing_half_written(folder):
    new, newest = folder / "new", checkpoint.path_of(folder, 3)
    there = folder / "official" / "0000003.pt"
    half = checkpoint.path_of(folder, 2)
    (half / MARKER).unlink()
    for words, *arguments in (
        ("exists already", newest, "official", there),
        ("format is 'gguf', expected one of official, sra, saf", newest, "gguf", new / "x"),
        ("0000003 is of a run with --align repa, expected sra", newest, "sra", new / "step-3.pt"),
        ("not a complete checkpoint", half, "official", new / "y.pt"),
    ):
        refused(partial(export, *arguments), words)
    assert not list(folder.glob("new/*"))


@pytest.mark.parametrize("name, place", [
    ("x.pt", "torch.save"),
    ("x.safetensors", "safetensors.torch.save_file"),
    ("x.safetensors", "repa_fast.checkpoint.export.description"),
])  # fmt: skip
def test_an_export_that_fails_leaves_nothing(saved, tmp_path, monkeypatch, name, place):
    def fail(*arguments):
        for file in arguments[1:]:
            file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(place, fail)
    to = format_of(tmp_path / name)
    call = partial(export, saved, to, tmp_path / name)
    refused(call, "No space left", error=Failure)
    assert not list(tmp_path.iterdir())
    (tmp_path / "x.json").write_text("mine")
    if to == "safetensors":
        refused(call, "x.json exists already")
    assert [*tmp_path.iterdir()] == [tmp_path / "x.json"]


def test_sras_file_has_its_keys_and_goes_on_bit_for_bit(tmp_path):
    sra = {"align": "sra", "block_out_s": 1, "block_out_t": 3}
    state, file = tiny_state(**sra), tmp_path / "step-500000.pt"
    train_step(state, synthetic_batch(state, 12)[0])
    state.step = 500_000
    assert cli.main(["export", str(checkpoint.save(tmp_path, state)), "--out", str(file)]) == 0
    contents = formats.read_file(file)
    assert contents.keys() == {"model", "ema", "opt", "args", "epoch", "steps"}
    # 500,000 steps of 12 images over the 1,281,167 of ImageNet are 4.7 epochs.
    assert (contents["epoch"], contents["steps"]) == (4, 500_000)
    names = set(state.model.state_dict())
    assert contents["model"].keys() == contents["ema"].keys() == names
    assert {"ap_head.linear1.weight", "ap_head.linear2.bias"} <= names
    assert not any(name.startswith("projectors.") for name in names)
    other = tiny_state(**sra, seed=5, resume=str(file))
    resumed(tmp_path / "none", other)
    assert_same_weights(other, state)
    assert other.step == 500_000
    head = {name for name in names if name.startswith("ap_head.")}
    assert formats.read_weights(file).keys() == names - head


def test_the_format_follows_the_name_and_the_name_the_format(saved):
    for to, names in {
        "official": ("0000003.pt", "my-step-3.pt"),
        "safetensors": ("x.safetensors", "step-3.safetensors"),
        "sra": ("step-3.pt", "epoch-12.pt"),
    }.items():
        default = file_beside(saved, to)
        assert default.parent == saved.parent and "3" in default.name
        assert {format_of(saved.parent / name) for name in (*names, default.name)} == {to}
