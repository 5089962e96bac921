"""Weights in one call: from a run, a folder and a hub, with their class names and samples."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from repa_fast.checkpoint import hub as hub_paths
from repa_fast.checkpoint.export import export
from repa_fast.checkpoint.layout import run_folder
from repa_fast.data.digits import digits_metadata
from repa_fast.eval.generate import GenerateConfig, generate
from repa_fast.eval.info import InfoConfig, info
from repa_fast.eval.load import load as load_model
from repa_fast.eval.pictures import arrange, save_png
from repa_fast.eval.sample import SampleConfig, numbered, sample
from repa_fast.failure import Failure
from repa_fast.share.pipeline import SiTPipeline
from repa_fast.share.pretrained import ShareConfig, load, share, upload
from tests.eval import checkpoints
from tests.refusals import refused

WORDS = digits_metadata().class_names


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    return load(run).save_pretrained(tmp_path_factory.mktemp("shared") / "tiny")


def test_one_call_gives_model_metadata_and_the_images_of_the_command(run, tmp_path):
    loaded = load(run)
    assert loaded.model.num_classes == 10 and loaded.metadata == digits_metadata()
    images = loaded.sample(["3", 8], count=2, seed=5, num_steps=3, cfg_scale=2.0)
    assert images.shape == (4, 3, 16, 16) and images.dtype == torch.uint8
    config = SampleConfig(
        ckpt=str(run), classes=("3", "8"), count=2, seed=5, num_steps=3, cfg_scale=2.0,
        out=str(tmp_path / "x.png"),
    )  # fmt: skip
    sample(config)
    save_png(arrange(images, 2, ["3", "3", "8", "8"]), tmp_path / "y.png")
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "y.png").read_bytes()
    assert len(loaded.sample(num_steps=1)) == 10
    refused(lambda: loaded.sample(["eleven"]), r"class is 'eleven', expected a number below 10")


def test_a_folder_gives_the_same_model_and_names_and_no_path_of_this_machine(run, folder):
    native, shared = load(run), load(folder)
    assert (shared.digest, shared.step, shared.weights) == (native.digest, 7, "ema")
    assert shared.metadata == native.metadata and shared.name == native.name
    assert shared.objective.path_type == native.objective.path_type
    same = {"classes": ["2"], "count": 2, "num_steps": 2}
    assert torch.equal(shared.sample(**same), native.sample(**same))
    texts = [path.read_text() for path in folder.rglob("*.*") if path.suffix != ".safetensors"]
    assert len(texts) == 5  # card, index, two configs, training's settings
    assert not [text for text in texts if str(run) in text or "data_dir" in text]
    assert "projectors" not in (folder / "transformer/config.json").read_text()
    assert load(folder / "transformer").digest == native.digest
    assert load(hub_paths.find(folder)).digest == native.digest
    refused(lambda: native.save_pretrained(folder), "tiny exists already; remove it first$")


def test_bare_weights_and_several_classes_as_numbers_travel_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": checkpoints.sit(z_dims=()).state_dict()}, "x.pt")
    save_file(checkpoints.sit(z_dims=()).state_dict(), "y.safetensors")
    for name in ("x.pt", "y.safetensors"):
        bare = load(name, num_heads=4)
        back = load(bare.save_pretrained(f"of-{name}"))
        assert (back.digest, back.step, back.weights) == (bare.digest, None, bare.weights)
        assert "step" not in info(InfoConfig(path=f"of-{name}"))
    classes = (np.int64(3), torch.tensor(4))
    assert numbered(classes, 1, WORDS)[1].tolist() == [3, 4]
    assert numbered("7", 2, WORDS)[1].tolist() == [7, 7]
    refused(lambda: numbered(-1, 1, WORDS), "class is -1, expected a number below 10")


def test_commands_take_a_shared_folder_and_write_into_the_current_one(
    folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    out = sample(SampleConfig(ckpt=str(folder), classes=("1",), count=1, num_steps=1))
    assert out.parent == Path() and out.name.startswith("sample-0000007-ode-1")
    config = GenerateConfig(ckpt=str(folder), num_fid_samples=2, num_steps=1, per_proc_batch_size=2)
    assert generate(config).parent == Path("samples")
    assert run_folder(folder) is None


def test_no_link_is_published_and_no_other_file(run, hub, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("a secret")
    mine = tmp_path / "run"
    shutil.copytree(run, mine)
    (mine / "samples.png").symlink_to(secret)
    folder = load(mine).save_pretrained(tmp_path / "out")
    assert not (folder / "samples.png").exists()
    (folder / ".env").write_text("a secret")
    upload(folder, "me/x")
    there = hub.repositories["me/x"]
    assert set(there) == {
        "README.md", "model_index.json", "scheduler/scheduler_config.json", "training.yaml",
        "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    (folder / "transformer" / "notes.txt").symlink_to(secret)
    refused(lambda: upload(folder, "me/y"), r"notes\.txt is a link, expected a file or folder of")
    assert "me/y" not in hub.repositories


def test_only_the_grid_of_the_same_weights_is_shown(tmp_path):
    run = checkpoints.run(tmp_path / "run", steps=(3, 7))
    (run / "samples.png").write_bytes(b"of step 7")
    for number, (source, weights) in enumerate(
        ((run, "ema"), (run, "model"), (run / "checkpoints" / "0000003", "ema"))
    ):
        folder = load(source, weights=weights).save_pretrained(tmp_path / str(number))
        assert (folder / "samples.png").exists() == (number == 0)


def test_weights_of_ours_are_of_no_other_origin(folder, tmp_path):
    for source in (folder, folder / "transformer"):
        refused(
            lambda source=source: load(source, origin="sit"), "is of repa-fast, expected origin"
        )


def test_a_damaged_checkpoint_is_shared_only_as_it_is(tmp_path):
    run = checkpoints.run(tmp_path / "run")
    config = run / "checkpoints" / "0000007" / "config.json"
    config.write_text(config.read_text() + " ")
    out = str(tmp_path / "out")
    refused(lambda: share(ShareConfig(ckpt=str(run), out=out)), "is damaged")
    share(ShareConfig(ckpt=str(run), out=out, verify=False))
    assert load(out).step == 7


def test_info_says_what_a_shared_folder_is(folder):
    text = info(InfoConfig(path=str(folder)))
    assert f"{folder / hub_paths.TRANSFORMER / hub_paths.WEIGHTS_FILE}: bare weights" in text
    assert text.endswith("weights ema, step 7, classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9")


def test_a_ddpm_and_a_flow_of_another_path_travel_too(tmp_path):
    of_ddpm = {"objective": "ddpm", "model": "DiT-S/4", "enc_type": "none"}
    for name, changes in (("dit", of_ddpm), ("cosine", {"path_type": "cosine"})):
        native = load(checkpoints.run(tmp_path / name, **changes))
        shared = load(native.save_pretrained(tmp_path / f"{name}-shared"))
        assert shared.digest == native.digest
        assert shared.objective.name == native.objective.name
        assert shared.objective.path_type == native.objective.path_type


@pytest.mark.parametrize("to", ["official", "safetensors"])
def test_class_names_and_step_travel_with_exported_weights(tmp_path, to):
    native = checkpoints.run(tmp_path / "run", checkpoints.LATENTS, enc_type="none", patch_size=2)
    out = tmp_path / ("x.pt" if to == "official" else "x.safetensors")
    export(native / "checkpoints" / "0000007", to, out)
    found = load_model(out)
    assert found.metadata == checkpoints.LATENTS and found.step == 7
    # of a file whose arguments hold a text by that name, another program's, nothing is taken
    other = checkpoints.official(tmp_path / "y.pt", checkpoints.sit(), num_heads=4, dataset="cats")
    assert load_model(other).metadata.class_names == tuple("01234")


def test_to_the_hub_and_back(run, hub, tmp_path):
    native = load(run)
    assert native.push_to_hub("me/tiny", private=True) == f"{hub.address}/me/tiny"
    assert hub.private == {"me/tiny"} and hub.tokens == {"Bearer hf_of_a_test"}
    assert 'repa_fast.load("me/tiny")' in hub.repositories["me/tiny"]["README.md"].decode()
    back = load("me/tiny")
    assert (back.digest, back.step, back.metadata) == (native.digest, 7, native.metadata)
    commit = back.source.parents[1].name
    assert load(f"me/tiny@{commit}").digest == native.digest
    pipeline = SiTPipeline.from_pretrained("me/tiny", revision=commit)
    assert torch.equal(pipeline.transformer.pos_embed, back.model.pos_embed)
    assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    out = str(tmp_path / "again")
    told = share(ShareConfig(ckpt="me/tiny", out=out, push_to="me/again"))
    assert told == f"{hub.address}/me/again"
    assert share(ShareConfig(ckpt=out, push_to="me/as-it-is")) == f"{hub.address}/me/as-it-is"
    assert hub.repositories["me/as-it-is"] == hub.repositories["me/again"]
    hub.repositories["me/empty"] = {"README.md": b"nothing"}
    for name, words in (
        ("me/nothing", r"^me/nothing does not exist here, and cannot be fetched .*NotFound"),
        ("me/empty", "^me/empty on the hub has no transformer/diffusion_pytorch_model"),
    ):
        with pytest.raises(Failure, match=words) as failed:
            load(name)
        assert "\n" not in str(failed.value)


def test_what_is_no_source_or_no_repository_is_refused(run, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exps").mkdir()
    words = "^{} does not exist, expected a run, a checkpoint, a weight file, or owner/name"
    for name in ("exps/typo", "nowhere", "a/b/c"):  # a folder of ours is not asked for on the hub
        refused(lambda name=name: load(name), words.format(name))
    refused(lambda: upload(folder, "no-owner"), "push_to is 'no-owner', expected owner/name$")
    for path in (run, folder / "transformer", "me/tiny"):
        words = "is no shared folder, expected one that `repa-fast share` wrote"
        refused(lambda path=path: upload(path, "me/x"), words)
    out = tmp_path / "not-yet"
    refused(lambda: share(ShareConfig(ckpt=str(run), out=str(out), push_to="x")), "push_to is 'x'")
    assert not out.exists()
    config = ShareConfig(ckpt=str(run))
    refused(lambda: share(config), "out and push_to are empty, expected a folder to write, or ow")
    words = share(dataclasses.replace(config, out=str(tmp_path / "new")))
    assert words.endswith(f"choose a licence, and OWNER, in {tmp_path}/new/README.md")


@pytest.mark.parametrize("change, words", [
    ({"step": -1}, r"step is -1, expected an integer from 0 on$"),
    ({"weights": "x"}, r"weights is 'x', expected model, ema"),
    ({"dataset": {}}, r"config\.json: lacks resolution"),
    ({"model": 3}, r"model or objective is no dictionary"),
    ({"dataset": {"resolution": 32}}, r"config\.json: resolution is 32, expected 16 \(pixels\)"),
])  # fmt: skip
def test_a_description_that_is_not_as_written_is_refused_by_its_file(run, tmp_path, change, words):
    shared = load(run).save_pretrained(tmp_path / "x")
    config = shared / "transformer" / "config.json"
    values = json.loads(config.read_text())
    if change.get("dataset"):
        change = {"dataset": values["dataset"] | change["dataset"]}
    config.write_text(json.dumps(values | change))
    refused(lambda: load(shared), words)
