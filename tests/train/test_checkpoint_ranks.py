"""Checkpoints of several processes: sharded or not, read by as many as there are."""

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

pytest.importorskip("lance")

from repa_fast.checkpoint import formats, writer
from repa_fast.checkpoint.export import export
from repa_fast.checkpoint.layout import MARKER, path_of, read_native, steps
from repa_fast.distributed import World
from repa_fast.train import checkpoint
from tests.launching import launch
from tests.train import checkpoint_ranks
from tests.train.checkpoint_ranks import FAILING, LOADS, SAVED, SAVES

pytestmark = pytest.mark.usefixtures("torchrun")

WORLD = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder with the checkpoints of all jobs and what each process found."""
    folder = tmp_path_factory.mktemp("ranks")
    process = launch("tests.train.checkpoint_ranks", 4, OUT=str(folder))
    assert process.returncode == 0, process.stderr
    return folder


def found(out, name, size):
    return [torch.load(out / f"{name}.{rank}", weights_only=True) for rank in range(size)]


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def assert_close(actual, expected, start):
    """To 1e-3 of how far a step went, as sums over processes are of another order."""
    for name, value in expected.items():
        moved = (value - start[name]).norm()
        assert (actual[name] - value).norm() <= 1e-3 * moved + 1e-7, name


@pytest.mark.parametrize("name", SAVES)
def test_what_is_stored_is_of_its_step_though_training_went_on(out, name):
    job, target = found(out, name, SAVES[name])[0], path_of(out / name, SAVED)
    assert_equal(read_native(target, ""), job["saved"])
    moved = [key for key in job["saved"] if not torch.equal(job["saved"][key], job["next"][key])]
    assert {key.split(".")[0] for key in moved} == {"model", "ema", "optimizer"}
    assert writer.damage(target) == ""
    assert len(job["lines"]) == 1 and job["lines"][0].startswith(f"checkpoint {target} paused the ")


@pytest.mark.parametrize("name", SAVES)
def test_every_process_writes_about_as_much(out, name):
    sizes = [file.stat().st_size for file in sorted(path_of(out / name, SAVED).glob("__*.distcp"))]
    assert len(sizes) == SAVES[name]
    assert max(sizes) < 1.2 * min(sizes)


def test_names_and_shapes_do_not_depend_on_how_it_was_saved(out):
    kinds = [*SAVES, *LOADS]
    entries = [
        FileSystemReader(path_of(out / name, SAVED)).read_metadata().state_dict_metadata
        for name in kinds
    ]
    sizes = [{name: tuple(entry.size) for name, entry in each.items()} for each in entries]
    assert all(each == sizes[0] for each in sizes)
    chunks = {
        name: len(each["model.blocks.0.mlp.fc1.weight"].chunks)
        for name, each in zip(kinds, entries, strict=True)
    }
    assert chunks == {"fsdp": 2, "ddp": 1, "fsdp on 3": 3, "fsdp on 3, was ddp": 3,
                      "hsdp on 4": 2, "ddp on 2, was fsdp": 1}  # fmt: skip


@pytest.mark.parametrize("name", LOADS)
def test_other_numbers_and_kinds_of_processes_load_the_same_bits_and_go_on(out, name):
    source, size = LOADS[name]
    first = found(out, source, SAVES[source])[0]
    for job in found(out, name, size):
        assert_equal(job["saved"], first["saved"])
        assert_close(job["next"], first["next"], first["saved"])
    assert_equal(read_native(path_of(out / name, SAVED), ""), first["saved"])


@pytest.mark.parametrize("name", ["fsdp", "hsdp on 4", "fsdp on 3"])
def test_one_process_loads_what_many_wrote(out, name):
    state = checkpoint_ranks.build(WORLD, "ddp", seed=7)
    checkpoint.load(path_of(out / name, SAVED), state)
    assert_equal(checkpoint_ranks.everything(state), found(out, "fsdp", 1)[0]["saved"])
    assert state.step == SAVED


def test_a_sharded_one_is_exported_to_the_official_file(out, tmp_path):
    export(path_of(out / "fsdp on 3", SAVED), "official", tmp_path / "0000002.pt")
    contents = formats.read_file(tmp_path / "0000002.pt")
    expected = found(out, "fsdp", 1)[0]["saved"]
    model = checkpoint_ranks.build(WORLD, "ddp").model
    assert list(contents["model"]) == list(contents["ema"]) == list(model.state_dict())
    for part in ("model", "ema"):
        stored = {f"{part}.{name}": tensor for name, tensor in contents[part].items()}
        assert_equal(stored, {k: v for k, v in expected.items() if k.startswith(f"{part}.")})
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad:
            moment = contents["opt"]["state"][number]["exp_avg"]
            assert torch.equal(moment, expected[f"optimizer.state.{name}.exp_avg"])


def test_an_error_on_one_process_is_everyones_and_the_third_in_a_row_ends_the_run(out):
    for job in found(out, "failing", FAILING):
        written, first, second, _ = job["lines"]
        assert written.startswith(f"checkpoint {out / 'failing' / '0000000'} ")
        assert first.startswith(
            f"WARNING: checkpoint {out / 'failing' / '0000001'} was not written"
        )
        assert "No space left on device" in first and "newest whole one is 0000000" in first
        assert "0000002 was not written" in second
        (raised,) = job["raised"]
        assert raised.startswith("3: ") and "0000003 was not written" in raised
    assert steps(out / "failing") == [0]
    assert [path.name for path in (out / "failing").iterdir()] == ["0000000"]


def test_a_missing_shard_is_damage(out, tmp_path):
    import shutil

    target = path_of(tmp_path, SAVED)
    shutil.copytree(path_of(out / "fsdp", SAVED), target)
    (target / "__1_0.distcp").unlink()
    assert writer.damage(target) == "missing __1_0.distcp"
    with pytest.raises(ValueError, match=r"0000002 cannot be loaded: .*__1_0\.distcp"):
        read_native(target, "")
    assert (target / MARKER).exists()
