"""The model in any file: the same weights give the same model and the same digest."""

import argparse
import collections
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from repa_fast.checkpoint import formats
from repa_fast.checkpoint.export import ExportConfig, export, export_checkpoint, format_of
from repa_fast.checkpoint.layout import read_native
from repa_fast.checkpoint.marker import MARKER
from repa_fast.data.digits import digits_metadata
from repa_fast.diffusion.path import get
from repa_fast.eval.load import HASH_DIGITS, WeightsConfig, digest, load
from repa_fast.models.sit import SIZES, SiT
from tests.eval import checkpoints
from tests.eval.checkpoints import LATENTS, official, sit
from tests.refusals import refused

HEADS = checkpoints.TINY["num_heads"]


def trunk(model: SiT) -> formats.State:
    return without_projectors(model.state_dict())


def without_projectors(state: formats.State) -> formats.State:
    return {name: t for name, t in state.items() if not name.startswith("projectors.")}


def write(path: Path, contents) -> Path:
    (save_file if path.suffix == ".safetensors" else torch.save)(contents, path)
    return path


def assert_holds(loaded, expected: formats.State) -> None:
    """The model has exactly these weights, in fp32, and is ready to sample."""
    state = loaded.model.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name in state if not torch.equal(state[name], expected[name].float())] == []
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_of_a_run_the_newest_checkpoints_average_is_taken(run, loaded):
    newest = run / "checkpoints" / "0000007"
    average = read_native(newest, "ema.")
    assert "projectors.0.0.weight" in average
    assert_holds(loaded, without_projectors(average))
    assert (loaded.step, loaded.source) == (7, newest)
    assert loaded.metadata == digits_metadata()
    assert (loaded.objective.path_type, loaded.objective.prediction) == ("linear", "v")
    assert loaded.model.blocks[0].attn.num_heads == HEADS
    assert load(run, num_heads=HEADS).digest == loaded.digest
    assert re.fullmatch(r"SiT-[\w.-]+", loaded.name)


def test_each_set_of_weights_of_a_checkpoint_can_be_asked_for(tmp_path):
    averaged = checkpoints.run(tmp_path / "run", ema_decay="0.9,0.5")
    source, found = averaged / "checkpoints" / "0000007", {}
    for weights in ("model", "ema", "ema_2"):
        one = load(averaged, weights=weights)
        found[weights] = one.digest
        assert_holds(one, without_projectors(read_native(source, f"{weights}.")))
        assert one.weights == weights
    assert load(averaged).digest == found["ema"] and len(set(found.values())) == 3
    assert load(averaged, weights="ema_2").place == "0000007-ema_2"
    assert load(averaged).place == "0000007"
    words = re.escape(f"{source} has no weights ema_3, expected one of model, ema, ema_2")
    refused(lambda: load(averaged, weights="ema_3"), f"^{words}$")
    config = WeightsConfig(ckpt=str(averaged), weights="model")
    assert config.load(torch.device("cpu")).digest == found["model"]


@pytest.mark.parametrize("to, name", [
    ("safetensors", "0000007-ema_2.safetensors"),
    ("official", "0000007-ema_2.pt"),
    ("sra", "step-7-ema_2.pt"),
])  # fmt: skip
def test_each_set_of_weights_can_be_exported(tmp_path, to, name):
    of_sra = (
        {"align": "sra", "enc_type": "none", "block_out_s": 1, "block_out_t": 3}
        if to == "sra"
        else {}
    )
    averaged = checkpoints.run(tmp_path / "run", ema_decay="0.9,0.5", **of_sra)
    config = ExportConfig(checkpoint=averaged, to=to, weights="ema_2")
    out = export_checkpoint(config)
    assert out == averaged / "checkpoints" / name and format_of(out) == to
    exported, native = load(out), load(averaged, weights="ema_2")
    assert exported.digest == native.digest != load(averaged).digest
    if to == "safetensors":
        assert json.loads(out.with_suffix(".json").read_text())["weights"] == "ema_2"
        assert (exported.weights, exported.place) == ("ema_2", "0000007-ema_2")
    else:
        assert load(out, weights="model").digest == load(averaged, weights="model").digest
    words = "0000007 has no weights ema_4, expected one of model, ema, ema_2$"
    other = dataclasses.replace(config, weights="ema_4", out=tmp_path / out.name)
    refused(lambda: export_checkpoint(other), words)
    assert not (tmp_path / out.name).exists()


def test_files_have_the_weights_they_have(tmp_path):
    both = official(tmp_path / "x.pt", sit(), num_heads=HEADS)
    assert_holds(load(both), trunk(sit()))
    assert_holds(load(both, weights="model"), trunk(sit(100)))
    assert [load(both, weights=name).weights for name in ("ema", "model")] == ["ema", "model"]
    words = r"x\.pt has no weights ema_2, expected one of model, ema$"
    refused(lambda: load(both, weights="ema_2"), words)
    alone = write(tmp_path / "y.pt", {"model": sit().state_dict()})
    assert load(alone, num_heads=HEADS).weights == "model"
    words = r"y\.pt has no weights ema_2, expected one of model$"
    refused(lambda: load(alone, num_heads=HEADS, weights="ema_2"), words)
    for name in ("z.pt", "z.safetensors"):
        bare = write(tmp_path / name, sit().state_dict())
        assert load(bare, num_heads=HEADS).weights == ""
        words = f"{name} holds a single set of weights, expected ema, the default, got model$"
        refused(lambda bare=bare: load(bare, num_heads=HEADS, weights="model"), words)


def test_a_native_checkpoint_is_read_by_its_directory_and_an_incomplete_one_not_taken(
    run, loaded, tmp_path
):
    older, newer = (load(run / "checkpoints" / name) for name in ("0000003", "0000007"))
    assert (older.step, newer.step) == (3, 7)
    assert older.digest != newer.digest == loaded.digest
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "0000007" / MARKER).unlink()
    assert load(tmp_path / "run").step == 3


def test_the_path_and_dataset_of_a_run_are_known(latents):
    assert latents.objective.path_type == "cosine" and latents.metadata == LATENTS
    assert latents.model.state_dict()["blocks.0.attn.q_norm.weight"].shape == (32 // HEADS,)


def test_an_official_file_is_its_average_or_weights_with_step_path_and_heads(tmp_path):
    model = sit()
    args = {"path_type": "cosine", "prediction": "v", "num_heads": HEADS}
    loaded = load(official(tmp_path / "0000300.pt", model, 300, **args))
    assert_holds(loaded, trunk(model))
    objective = loaded.objective
    assert (loaded.step, objective.path_type, objective.prediction) == (300, "cosine", "v")
    assert loaded.source == tmp_path / "0000300.pt"
    metadata = loaded.metadata
    assert (metadata.resolution, metadata.latent_shape) == (64, (4, 8, 8))
    assert (metadata.scale, metadata.bias) == (0.18215, 0.0)
    assert metadata.vae.startswith("sd-vae-ft-") and len(metadata.class_names) == 5
    source = write(tmp_path / "x.pt", {"model": sit(1).state_dict()})
    assert_holds(load(source, num_heads=HEADS), trunk(sit(1)))


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bare_weights_are_sampled_as_they_are_in_fp32(tmp_path, name, dtype):
    state = {key: tensor.to(dtype) for key, tensor in sit().state_dict().items()}
    (tmp_path / "x.json").write_text('{"model": "another program\'s"}')
    loaded = load(write(tmp_path / name, state), num_heads=HEADS)
    assert_holds(loaded, without_projectors(state))
    objective = loaded.objective
    assert (loaded.step, objective.path_type, objective.prediction) == (None, "linear", "v")


def test_the_heads_and_name_of_a_known_architecture_are_known(tmp_path):
    known = SIZES["S"]
    with torch.device("meta"):
        shapes = SiT(**known, num_classes=3, z_dims=()).state_dict()
    # one number each, repeated: a file of these sizes would take seconds
    state = {name: torch.zeros(()).expand(t.shape) for name, t in shapes.items()}
    loaded = load(write(tmp_path / "x.pt", state), model="SiT-S/2")
    assert loaded.model.blocks[0].attn.num_heads == known["num_heads"]
    assert "SiT-S" in loaded.name and "/" not in loaded.name
    assert loaded.metadata.resolution == 256


@pytest.mark.parametrize("trained, said, path, prediction, sign", [
    ({"path_type": "Linear", "prediction": "velocity"}, "", "linear", "v", -1),
    ({"path_type": "GVP", "prediction": "score"}, "", "cosine", "score", 1),
    ({"path_type": "VP", "prediction": "noise"}, "", "VP", "noise", 1),
    ({}, "", "linear", "v", -1),
    ({}, "v", "linear", "v", -1),
    ({}, "score", "linear", "score", 1),
    ({}, "noise", "linear", "noise", 1),
])  # fmt: skip
def test_path_and_prediction_of_the_original_sit_are_those_of_its_training_or_can_be_said(
    tmp_path, trained, said, path, prediction, sign
):
    """A score or noise is the same whichever way time runs; only the velocity changes its sign."""
    original = sit(z_dims=()).eval()
    contents = {"ema": checkpoints.of_original_sit(original.state_dict())}
    contents |= {"args": argparse.Namespace(**trained)} if trained else {}
    source = write(tmp_path / "x.pt", contents)
    loaded = load(source, origin="sit", num_heads=HEADS, prediction=said)
    assert get(loaded.objective.path_type) == get(path)
    assert loaded.objective.prediction == prediction
    x, t, y = torch.randn(4, 4, 8, 8), torch.linspace(0, 1, 4), torch.arange(4)
    expected = sign * original(x, 1 - t, y)[0]
    assert expected.std() > 0.1
    # fp32: the turned time features are other sums of 256 products
    bound = 1e-4 * expected.abs().max().item()
    assert torch.allclose(loaded.model(x, t, y)[0], expected, rtol=0, atol=bound)


SMALL = "depth 3, width 32, patch 4; .*, expected"
ORIGINAL = checkpoints.of_original_sit(sit(z_dims=()).state_dict())


@pytest.mark.parametrize("options, words", [
    ({"num_heads": 2}, r"0000007 has 4 heads, expected 2"),
    ({"model": "SiT-XL/2"}, f"{SMALL} SiT-XL/2"),
    ({"model": "SiT-S/4"}, f"{SMALL} SiT-S/4"),
    ({"model": "SiT-Q/2"}, r"model is 'SiT-Q/2', expected one of .*SiT-XL/2"),
    ({"origin": "dit"}, "is of repa-fast, expected origin repa, got dit"),
    ({"origin": "sit"}, "is of repa-fast, expected origin repa, got sit"),
])  # fmt: skip
def test_a_run_of_another_model_than_is_said_is_refused(run, options, words):
    refused(lambda: load(run, **options), words)


@pytest.mark.parametrize("content, options, words", [
    (sit().state_dict(), {}, r"x\.pt: depth 3 and width 32 .*--num-heads"),
    (ORIGINAL, {"num_heads": HEADS}, "8 channels, expected 4: .*origin"),
    ([1, 2], {}, "holds a list, expected a dictionary"),
    (torch.zeros(3), {}, "holds a Tensor, expected a dictionary"),
    ({"epoch": 3}, {}, "not the weights of a SiT"),
    (None, {}, "x.pt does not exist, expected a run"),
])  # fmt: skip
def test_a_file_without_weights_of_ours_is_refused(tmp_path, content, options, words):
    source = tmp_path / "x.pt"
    if content is not None:
        write(source, content)
    refused(lambda: load(source, **options), words)
    refused(lambda: load(tmp_path), "neither a complete checkpoint nor a run")


class Code:
    def __reduce__(self):
        return (pytest.fail, ("code of a file ran",))


def test_no_code_of_a_file_is_run(tmp_path):
    source = write(tmp_path / "x.pt", {"ema": sit().state_dict(), "args": Code()})
    refused(lambda: load(source, num_heads=HEADS), r"x\.pt holds code: it names pytest\.fail|_pyt")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_file_cut_short_is_named(tmp_path, name, kept):
    whole = write(tmp_path / name, sit().state_dict())
    content = whole.read_bytes()
    whole.write_bytes(content[: int(kept * len(content))])
    refused(lambda: load(whole, num_heads=HEADS), re.escape(f"{whole} is damaged"))


def test_a_missing_tensor_is_named(tmp_path):
    state = sit().state_dict()
    del state["blocks.1.mlp.fc2.bias"]
    source = write(tmp_path / "x.pt", state)
    words = r"x\.pt does not fit the model, it lacks 1: blocks\.1\.mlp\.fc2\.bias\."
    refused(lambda: load(source, num_heads=HEADS), words)


def bomb() -> collections.OrderedDict:
    """A few hundred bytes whose text is 2^40 long, and which reprlib does not cut."""
    inner = [1, 1]
    for _ in range(40):
        inner = [inner, inner]
    return collections.OrderedDict(x=inner)


ODD = [
    ({"num_heads": "4"}, "num_heads is '4', expected an integer from 0 on"),
    ({"num_heads": -4}, "num_heads is -4, expected an integer"),
    ({"model": ["SiT-XL/2"]}, r"model is \[.*, expected text"),
    ({"path_type": {}}, "path_type is {}, expected text"),
    ({"prediction": None}, "prediction is None, expected text"),
    ({"resolution": torch.zeros(2, 2)}, "resolution is a Tensor"),
    ({"path_type": "round"}, "path_type is 'round', expected"),
    ({"num_heads": 7}, "7 heads, expected a number that divides the width 32"),
    ({"model": bomb()}, "model is a OrderedDict, expected text"),
]


@pytest.mark.parametrize("args, words", ODD, ids=[words for _, words in ODD])
def test_training_arguments_of_another_kind_are_refused_by_name(tmp_path, args, words):
    contents = {"ema": sit().state_dict(), "args": argparse.Namespace(**args)}
    source = write(tmp_path / "x.pt", contents)
    refused(lambda: load(source), rf"x\.pt: {words}")


DATASET = dataclasses.asdict(digits_metadata())
FITTING = dataclasses.asdict(LATENTS)
WRITTEN = {"model": {"num_heads": HEADS}, "objective": {}, "dataset": DATASET}
OTHERS = [
    ({"latent_shape": (3, 16, 16)}, r"latent_shape is \(3, 16, 16\), expected \(4, 8, 8\)"),
    ({"class_names": list("abcdefgh")}, "8 class names, expected at most 5 .the weights'."),
]
DESCRIPTIONS = [
    *[(WRITTEN | {"dataset": FITTING | other}, words) for other, words in OTHERS],
    ("{", "Expecting"),
    ("[" * 100_000, "recursion"),
    ([WRITTEN], "holds a list, expected values by name"),
    ("null", "holds a NoneType"),
    (WRITTEN | {"model": [1]}, "model or objective is no dictionary"),
    (WRITTEN | {"objective": "flow"}, "model or objective is no dictionary"),
    (WRITTEN | {"objective": {"objective": 3}}, "objective is 3, expected text"),
    (WRITTEN | {"weights": "../x"}, r"weights is '\.\./x', expected model, ema, ema_2 or so"),
    (WRITTEN | {"weights": 3}, "weights is 3, expected model"),
    (WRITTEN | {"dataset": 3}, "is 3, expected resolution, latent_shape"),
    (WRITTEN | {"dataset": DATASET | {"scale": 0}}, "scale is 0, expected a "),
]


@pytest.mark.parametrize("described, words", DESCRIPTIONS, ids=[words for _, words in DESCRIPTIONS])
def test_a_description_beside_weights_that_is_none_is_refused_by_name(tmp_path, described, words):
    source = write(tmp_path / "x.safetensors", sit().state_dict())
    text = described if isinstance(described, str) else json.dumps(described)
    source.with_suffix(".json").write_text(text, encoding="utf-8")
    refused(lambda: load(source), rf"x\.json: .*{words}")


@pytest.mark.parametrize("file, changes, words", [
    ("config.json", {"num_heads": 7}, ": 7 heads, expected a number that divides the width 32"),
    ("config.json", {"path_type": "round"}, ": .*path_type is 'round', expected"),
    ("dataset.json", {"latent_shape": [3, 32, 32]}, r"/dataset.json: .*latent_shape is .3, 32, 32"),
    ("dataset.json", {"class_names": ["a"] * 12}, "/dataset.json: 12 class names, expected at mos"),
])  # fmt: skip
def test_a_run_whose_files_contradict_its_weights_is_refused_by_name(
    run, tmp_path, file, changes, words
):
    source = shutil.copytree(run / "checkpoints" / "0000007", tmp_path / "0000007")
    values = json.loads((source / file).read_text()) | changes
    (source / file).write_text(json.dumps(values))
    config = WeightsConfig(ckpt=str(source), verify=False)
    refused(lambda: config.load(torch.device("cpu")), f"0000007{words}")


def test_the_digest_is_of_the_values_and_not_of_the_file(tmp_path):
    state = sit().state_dict()
    files = [
        write(tmp_path / "bare.pt", state),
        write(tmp_path / "trunk.pt", trunk(sit())),
        write(tmp_path / "ddp.pt", {f"module.{name}": t for name, t in state.items()}),
        write(tmp_path / "x.safetensors", state),
        official(tmp_path / "0000007.pt", sit()),
    ]
    [found] = {load(file, num_heads=HEADS).digest for file in files}
    assert re.fullmatch(rf"[0-9a-f]{{{HASH_DIGITS}}}", found)


@pytest.mark.parametrize("trained, name", [
    ({}, "x.pt"),
    ({}, "x.safetensors"),
    ({"objective": "ddpm"}, "x.safetensors"),
    ({"prediction": "noise"}, "x.safetensors"),
])  # fmt: skip
def test_an_exported_checkpoint_is_the_same_model_that_predicts_the_same(
    loaded, tmp_path, trained, name
):
    native = load(checkpoints.run(tmp_path / "run", **trained)) if trained else loaded
    export(native.source, "official" if name == "x.pt" else "safetensors", tmp_path / name)
    exported = load(tmp_path / name)
    assert (exported.digest, exported.name) == (native.digest, native.name)
    assert exported.metadata == native.metadata
    assert vars(exported.objective) == vars(native.objective)
    assert_holds(exported, native.model.state_dict())


def test_the_digest_depends_on_every_value_name_and_shape():
    state = trunk(sit())
    found = {digest(state)}
    assert digest(dict(reversed(state.items()))) in found
    for name, tensor in state.items():
        for position in (0, -1):
            changed = tensor.clone()
            value = changed.view(-1)[position]
            changed.view(-1)[position] = torch.nextafter(value, torch.tensor(torch.inf))
            found.add(digest(state | {name: changed}))
    assert len(found) == 1 + 2 * len(state)
    renamed = {name.replace("fc1", "fc3"): tensor for name, tensor in state.items()}
    reshaped = state | {"pos_embed": state["pos_embed"].reshape(-1)}
    assert {digest(renamed), digest(reshaped)}.isdisjoint(found)
    assert digest(renamed) != digest(reshaped)


def bytes_read() -> int:
    """What this process asked the system to read; mapped files are not in it (nor is the CRC)."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
def test_the_optimizer_of_an_official_file_is_not_read_into_memory(tmp_path):
    path = official(tmp_path / "x.pt", sit(), num_heads=HEADS)
    contents = torch.load(path, weights_only=False)
    contents["opt"]["state"][0] = {"exp_avg": torch.zeros(2**24)}
    write(path, contents)
    before = bytes_read()
    assert_holds(load(path), trunk(sit()))
    assert path.stat().st_size > 2**26
    assert bytes_read() - before < 2**22
