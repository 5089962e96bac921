"""Checkpoints of several processes: sharded or not, read by as many as there are."""

import functools
import shutil

import pytest
from torch.distributed.checkpoint import FileSystemReader

pytest.importorskip("lance")
pytest.importorskip("timm")

from repa_fast.checkpoint import marker
from repa_fast.checkpoint.export import export
from repa_fast.checkpoint.layout import path_of, read_native, steps
from tests.refusals import refused
from tests.train import checkpoint_ranks as cases
from tests.train.checkpoint_ranks import SAVED
from tests.train.conftest import tiny_config
from tests.train.parallel_ranks import ALONE, FSDP, REPLICATED, SQUARE, distance, only, unequal

MODES = {"ddp": {}, "fsdp": FSDP, "hsdp 2 x 1": REPLICATED, "hsdp 2 x 2": SQUARE}
HEAVY = pytest.mark.heavy
LOADS = [  # saved as, loaded as, by so many processes; parts of a matrix when they save it again
    ("fsdp", "hsdp 2 x 1", 2, 1),
    ("ddp", "fsdp", 2, 2),
    ("fsdp", "ddp", 1, 0),
    pytest.param("fsdp", "ddp", 2, 1, marks=HEAVY),
    pytest.param("fsdp", "fsdp", 2, 2, marks=HEAVY),
    pytest.param("fsdp", "fsdp", 3, 3, marks=HEAVY),
    pytest.param("ddp", "fsdp", 3, 3, marks=HEAVY),
    pytest.param("fsdp", "hsdp 2 x 2", 4, 2, marks=HEAVY),
]


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """Mode -> (the checkpoint of two processes, what each of them found)."""

    def save(mode):
        folder = tmp_path_factory.mktemp("saved") / mode
        found = ranks(cases.save_while_training, MODES[mode], folder)
        return path_of(folder, SAVED), found

    return functools.cache(save)


def entries(target):
    """Of a checkpoint's index: names with shapes, and the parts of one matrix."""
    metadata = FileSystemReader(target).read_metadata().state_dict_metadata
    sizes = {name: tuple(entry.size) for name, entry in metadata.items()}
    return sizes, len(metadata["model.blocks.0.mlp.fc1.weight"].chunks)


@pytest.mark.parametrize("mode", ["fsdp", "ddp"])
def test_what_is_stored_is_of_its_step_though_training_went_on(saved, mode):
    """Under the official names; both processes write about as much."""
    target, (job, _) = saved(mode)
    assert unequal(read_native(target, ""), job["saved"]) == []
    moved = unequal(job["next"], job["saved"])
    assert {key.split(".")[0] for key in moved} == {"model", "ema", "ema_2", "optimizer"}
    assert marker.damage(target) == ""
    assert len(job["lines"]) == 1 and job["lines"][0].startswith(f"checkpoint {target} paused the ")
    names = [name.removeprefix("model.") for name in job["saved"] if name.startswith("model.")]
    assert names == list(cases.build(ALONE, tiny_config()).model.state_dict())
    small, large = sorted(file.stat().st_size for file in target.glob("__*.distcp"))
    assert large < 1.2 * small


@pytest.mark.parametrize("source, mode, size, parts", LOADS)
def test_other_kinds_and_numbers_of_processes_load_the_same_bits_and_go_on(
    ranks, saved, tmp_path, source, mode, size, parts
):
    """As if nothing had been, and what they save again has the same names, shapes and bits."""
    target, (first, _) = saved(source)
    arguments = (MODES[mode], target, tmp_path)
    if size == 1:
        found = [cases.load_and_go_on(ALONE, *arguments)]
    else:
        found = ranks(cases.load_and_go_on, *arguments, size=size)
        again = path_of(tmp_path, SAVED)
        assert unequal(read_native(again, ""), first["saved"]) == []
        assert entries(again) == (entries(target)[0], parts)
        found.append(cases.load_and_go_on(ALONE, {}, again, tmp_path))
    for job in found:
        assert job["step"] == SAVED
        assert unequal(job["saved"], first["saved"]) == []
        for kinds in (["model", "ema", "ema_2"], ["optimizer"]):
            assert distance(only(job["next"], *kinds), only(first["next"], *kinds)) < 1e-6
        for name, value in first["next"].items():
            # To 1e-3 of how far a step went, as sums over processes are of another order.
            moved = (value - first["saved"][name]).norm()
            assert (job["next"][name] - value).norm() <= 1e-3 * moved + 1e-7, name


def test_an_official_file_of_a_sharded_one_goes_on_under_fsdp(ranks, saved, tmp_path):
    target, (job, _) = saved("fsdp")
    assert entries(target)[1] == 2
    file = tmp_path / "0000002.pt"
    export(target, "official", file)
    wanted = {name: t for name, t in job["saved"].items() if not name.startswith("ema_2.")}
    for found in (cases.load_official(ALONE, {}, file), *ranks(cases.load_official, FSDP, file)):
        assert unequal(found, wanted) == []


def test_an_error_on_one_process_is_everyones_and_the_third_in_a_row_ends_the_run(ranks, tmp_path):
    for job in ranks(cases.fail, FSDP, tmp_path):
        written, first, second, _ = job["lines"]
        assert written.startswith(f"checkpoint {tmp_path / '0000000'} ")
        assert first.startswith(f"WARNING: checkpoint {tmp_path / '0000001'} was not written")
        assert "No space left on device" in first and "newest whole one is 0000000" in first
        assert "0000002 was not written" in second
        (raised,) = job["raised"]
        assert raised.startswith("3: ") and "0000003 was not written" in raised
    assert steps(tmp_path) == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["0000000"]


def test_a_missing_shard_is_damage(saved, tmp_path):
    target = path_of(tmp_path, SAVED)
    shutil.copytree(saved("fsdp")[0], target)
    (target / "__1_0.distcp").unlink()
    assert marker.damage(target) == "missing __1_0.distcp"
    words = r"0000002 is damaged: missing __1_0\.distcp \(--no-verify"
    refused(lambda: read_native(target, ""), words)
