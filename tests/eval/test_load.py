"""The model in any file: the same weights give the same model and the same digest."""

import re
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from repa_fast.checkpoint import formats
from repa_fast.checkpoint.export import export
from repa_fast.checkpoint.layout import MARKER, read_native
from repa_fast.data.digits import digits_metadata
from repa_fast.eval.load import HASH_DIGITS, digest, load
from repa_fast.models.sit import SIZES, SiT
from tests.eval import checkpoints
from tests.eval.checkpoints import LATENTS, official, sit

HEADS = checkpoints.TINY["num_heads"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return checkpoints.run(tmp_path_factory.mktemp("run"), steps=(7, 20))


def trunk(model: SiT) -> formats.State:
    return without_projectors(model.state_dict())


def without_projectors(state: formats.State) -> formats.State:
    return {name: t for name, t in state.items() if not name.startswith("projectors.")}


def assert_holds(loaded, expected: formats.State) -> None:
    """The model has exactly these weights, in fp32, and is ready to sample."""
    state = loaded.model.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name in state if not torch.equal(state[name], expected[name].float())] == []
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_of_a_run_the_newest_checkpoints_average_is_taken(run):
    newest = run / "checkpoints" / "0000020"
    loaded = load(run)
    average = read_native(newest, "ema.")
    assert "projectors.0.0.weight" in average
    assert_holds(loaded, without_projectors(average))
    assert (loaded.step, loaded.source) == (20, newest)
    assert loaded.metadata == digits_metadata()
    assert (loaded.objective.path_type, loaded.objective.prediction) == ("linear", "v")
    assert loaded.model.blocks[0].attn.num_heads == HEADS


def test_a_native_checkpoint_is_read_by_its_directory(run):
    older, newer = (load(run / "checkpoints" / name) for name in ("0000007", "0000020"))
    assert (older.step, newer.step) == (7, 20)
    assert older.digest != newer.digest == load(run).digest


def test_the_path_and_dataset_of_a_run_are_known(tmp_path):
    folder = checkpoints.run(
        tmp_path, LATENTS, enc_type="none", patch_size=2, path_type="cosine", qk_norm=True
    )
    loaded = load(folder)
    assert loaded.objective.path_type == "cosine" and loaded.metadata == LATENTS
    assert loaded.model.state_dict()["blocks.0.attn.q_norm.weight"].shape == (32 // HEADS,)


def test_an_official_file_is_its_average_with_step_path_and_heads(tmp_path):
    model = sit()
    args = {"path_type": "cosine", "prediction": "v", "num_heads": HEADS}
    loaded = load(official(tmp_path / "0000300.pt", model, 300, **args))
    assert_holds(loaded, trunk(model))
    objective = loaded.objective
    assert (loaded.step, objective.path_type, objective.prediction) == (
        300,
        "cosine",
        "v",
    )
    assert loaded.source == tmp_path / "0000300.pt"
    metadata = loaded.metadata
    assert (metadata.resolution, metadata.latent_shape) == (64, (4, 8, 8))
    assert (metadata.scale, metadata.bias) == (0.18215, 0.0)
    assert metadata.vae.startswith("sd-vae-ft-") and len(metadata.class_names) == 5


def test_an_official_file_without_average_is_its_weights(tmp_path):
    model = sit()
    torch.save({"model": model.state_dict()}, tmp_path / "x.pt")
    assert_holds(load(tmp_path / "x.pt", num_heads=HEADS), trunk(model))


@pytest.mark.parametrize("name", ["last.pt", "last.safetensors"])
def test_bare_weights_are_sampled_as_they_are(tmp_path, name):
    model = sit()
    save = save_file if name.endswith("safetensors") else torch.save
    save(model.state_dict(), tmp_path / name)
    loaded = load(tmp_path / name, num_heads=HEADS)
    assert_holds(loaded, trunk(model))
    objective = loaded.objective
    assert (loaded.step, objective.path_type, objective.prediction) == (
        None,
        "linear",
        "v",
    )


def test_the_heads_and_name_of_a_known_architecture_are_known(tmp_path):
    known = SIZES["S"]
    with torch.device("meta"):
        shapes = SiT(**known, num_classes=3, z_dims=()).state_dict()
    # one number each, repeated: a file of these sizes would take seconds
    state = {name: torch.zeros(()).expand(t.shape) for name, t in shapes.items()}
    torch.save(state, tmp_path / "x.pt")
    loaded = load(tmp_path / "x.pt", model="SiT-S/2")
    assert loaded.model.blocks[0].attn.num_heads == known["num_heads"]
    assert "SiT-S" in loaded.name and "/" not in loaded.name
    assert loaded.metadata.resolution == 256


def test_heads_that_nothing_tells_must_be_said(tmp_path):
    torch.save(sit().state_dict(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: depth 3 and width 32 .*--num-heads"):
        load(tmp_path / "x.pt")


def test_other_heads_than_the_files_are_refused(run):
    assert load(run, num_heads=HEADS).model.blocks[0].attn.num_heads == HEADS
    with pytest.raises(ValueError, match=r"0000020 has 4 heads, expected 2"):
        load(run, num_heads=2)


@pytest.mark.parametrize("model", ["SiT-XL/2", "SiT-S/4"])
def test_another_model_than_said_is_refused_and_named(run, model):
    with pytest.raises(ValueError, match=rf"depth 3, width 32, patch 4; .*, expected {model}"):
        load(run, model=model)


def test_a_model_that_is_none_is_refused(run):
    with pytest.raises(ValueError, match=r"model is 'SiT-Q/2', expected one of .*SiT-XL/2"):
        load(run, model="SiT-Q/2")


def test_legacy_names_are_recognised(tmp_path):
    state = sit().state_dict()
    legacy = {re.sub(r"^blocks\.2\.", "decoder_blocks.0.", name): t for name, t in state.items()}
    assert "decoder_blocks.0.attn.qkv.weight" in legacy and len(legacy) == len(state)
    torch.save(legacy, tmp_path / "x.pt")
    loaded = load(tmp_path / "x.pt", num_heads=HEADS)
    assert_holds(loaded, trunk(sit()))


def assert_runs_backwards(model: SiT, original: SiT, sign: float) -> None:
    x = torch.randn(4, 4, 8, 8)
    t, y = torch.linspace(0, 1, 4), torch.arange(4)
    expected = sign * original(x, 1 - t, y)[0]
    assert expected.std() > 0.1
    # fp32: the turned time features are other sums of 256 products
    bound = 1e-4 * expected.abs().max().item()
    assert torch.allclose(model(x, t, y)[0], expected, rtol=0, atol=bound)


def test_the_original_sits_velocity_is_turned_around(tmp_path):
    original = sit(z_dims=()).eval()
    torch.save(checkpoints.of_original_sit(original.state_dict()), tmp_path / "x.pt")
    loaded = load(tmp_path / "x.pt", origin="sit", num_heads=HEADS)
    assert_runs_backwards(loaded.model, original, -1)
    with pytest.raises(ValueError, match=r"8 channels, expected 4: .*origin"):
        load(tmp_path / "x.pt", num_heads=HEADS)


@pytest.mark.parametrize(
    "theirs, path", [("Linear", "linear"), ("GVP", "GVP"), ("VP", "VP")]
)  # fmt: skip
@pytest.mark.parametrize(
    "prediction, ours, sign", [("velocity", "v", -1), ("score", "score", 1), ("noise", "noise", 1)]
)
def test_path_and_prediction_of_the_original_sits_training_are_ours(
    tmp_path, theirs, path, prediction, ours, sign
):
    """A score or noise is the same whichever way time runs; only the velocity changes its sign."""
    from repa_fast.diffusion.path import get

    original = sit(z_dims=()).eval()
    contents = {"ema": checkpoints.of_original_sit(original.state_dict())}
    args = {"path_type": theirs, "prediction": prediction, "num_heads": HEADS}
    source = official(tmp_path / "x.pt", original, **args)
    torch.save(torch.load(source, weights_only=False) | contents, source)
    loaded = load(source, origin="sit")
    assert (get(loaded.objective.path_type), loaded.objective.prediction) == (get(path), ours)
    assert_runs_backwards(loaded.model, original, sign)


@pytest.mark.parametrize("prediction, sign", [("v", -1), ("score", 1), ("noise", 1)])
def test_the_prediction_of_bare_weights_of_the_original_sit_can_be_said(tmp_path, prediction, sign):
    original = sit(z_dims=()).eval()
    torch.save(checkpoints.of_original_sit(original.state_dict()), tmp_path / "x.pt")
    loaded = load(tmp_path / "x.pt", origin="sit", num_heads=HEADS, prediction=prediction)
    assert loaded.objective.prediction == prediction
    assert_runs_backwards(loaded.model, original, sign)


def test_other_files_beside_safetensors_say_nothing(tmp_path):
    save_file(sit().state_dict(), tmp_path / "x.safetensors")
    (tmp_path / "x.json").write_text('{"model": "a diffusion transformer"}')
    assert_holds(load(tmp_path / "x.safetensors", num_heads=HEADS), trunk(sit()))


@pytest.mark.parametrize(
    "origin, message",
    [(name, f"native checkpoint, expected origin repa, got {name}") for name in ("dit", "sit")],
)
def test_a_run_is_of_no_other_origin(run, origin, message):
    with pytest.raises(ValueError, match=message):
        load(run, origin=origin)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_weights_stored_in_16_bits_become_fp32(tmp_path, name, dtype):
    state = {key: tensor.to(dtype) for key, tensor in trunk(sit()).items()}
    (save_file if name.endswith("safetensors") else torch.save)(state, tmp_path / name)
    assert_holds(load(tmp_path / name, num_heads=HEADS), state)


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing does not exist, expected a run"):
        load(tmp_path / "nothing")


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match="neither a complete checkpoint nor a run"):
        load(tmp_path)


def test_an_incomplete_checkpoint_is_not_taken(tmp_path):
    folder = checkpoints.run(tmp_path, steps=(7, 20))
    (folder / "checkpoints" / "0000020" / MARKER).unlink()
    assert load(folder).step == 7


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_file_cut_short_is_named(tmp_path, name, kept):
    whole = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(sit().state_dict(), whole)
    content = whole.read_bytes()
    whole.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=re.escape(f"{whole} is not a readable")):
        load(whole, num_heads=HEADS)


@pytest.mark.parametrize("contents", [[1, 2], torch.zeros(3), {"epoch": 3}])
def test_a_file_without_weights_is_named(tmp_path, contents):
    torch.save(contents, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"not the weights of a SiT|holds no weights"):
        load(tmp_path / "x.pt")


def test_a_missing_tensor_is_named(tmp_path):
    state = sit().state_dict()
    del state["blocks.1.mlp.fc2.bias"]
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt does not fit(.|\n)*missing: blocks\.1\.mlp\.fc2"):
        load(tmp_path / "x.pt", num_heads=HEADS)


def test_the_digest_is_of_the_values_and_not_of_the_file(tmp_path, run):
    state = sit().state_dict()
    torch.save(state, tmp_path / "bare.pt")
    torch.save(trunk(sit()), tmp_path / "trunk.pt")
    torch.save({f"module.{name}": t for name, t in state.items()}, tmp_path / "ddp.pt")
    save_file(state, tmp_path / "x.safetensors")
    official(tmp_path / "0000007.pt", sit())
    files = sorted(tmp_path.iterdir())
    digests = {load(file, num_heads=HEADS).digest for file in files}
    assert len(files) == 5 and len(digests) == 1
    assert re.fullmatch(rf"[0-9a-f]{{{HASH_DIGITS}}}", digests.pop())


@pytest.mark.parametrize("to, name", [("official", "x.pt"), ("safetensors", "x.safetensors")])
def test_an_exported_checkpoint_is_the_same_model(run, tmp_path, to, name):
    export(run / "checkpoints" / "0000020", to, tmp_path / name)
    exported, native = load(tmp_path / name), load(run)
    assert exported.digest == native.digest and exported.name == native.name
    assert exported.metadata == native.metadata
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


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
def test_the_optimizer_of_an_official_file_is_not_read(tmp_path):
    path = official(tmp_path / "x.pt", sit(), num_heads=HEADS)
    contents = torch.load(path, weights_only=False)
    contents["opt"]["state"][0]["exp_avg"] = torch.zeros(2**24)
    torch.save(contents, path)
    before = bytes_read()
    assert_holds(load(path), trunk(sit()))
    assert path.stat().st_size > 2**26
    assert bytes_read() - before < 2**22


def bytes_read() -> int:
    """What this process asked the system to read; mapped files are not in it."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def test_the_name_is_fit_for_a_file(run):
    assert re.fullmatch(r"SiT-[\w.-]+", load(run).name)


def test_no_code_of_a_file_is_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"ema": sit().state_dict(), "args": Hostile()}, tmp_path / "x.pt")
    assert zipfile.is_zipfile(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt is not a readable torch checkpoint"):
        load(tmp_path / "x.pt", num_heads=HEADS)
