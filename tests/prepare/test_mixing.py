"""Old and new do not mix: another recipe, other launches, what is left over, gone or damaged."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from repa_fast import encoders, ledger, lock
from repa_fast.data import dataset, digits
from repa_fast.data.dataset import LatentDataset
from repa_fast.prepare import fragments
from repa_fast.prepare.features import FeaturesConfig, prepare_features
from repa_fast.prepare.images import ImagesConfig, prepare_images
from repa_fast.prepare.sources import Subset, open_source
from tests.data.encoding import encode as saved
from tests.prepare import building, extracting
from tests.prepare.writing import rgb, tar, tree, write
from tests.refusals import refused

ROWS = 12  # two units


@pytest.fixture(params=[building, extracting], ids=["build", "extract"])
def work(request):
    return request.param


@pytest.fixture
def out(work, tmp_path):
    work.begin(tmp_path, ROWS)
    return tmp_path


def half(work, out, rows=ROWS, **changes):
    """Do every second unit; return the ledger's folder."""
    work.run(out, rows, rank=1, world_size=2, **changes)
    return out / work.FOLDER


def data_files(out, folder):
    """The files that the records of a ledger name, the last one written last."""
    record = json.loads((folder / "000001.json").read_text(encoding="utf-8"))
    return [out / "train.lance" / "data" / file["path"] for file in record["fragments"][0]["files"]]


def assert_finished(work, out):
    assert work.run(out, ROWS) == ROWS
    work.verify(out)
    assert sorted(path.name for path in out.iterdir()) == sorted([work.CHECKS, "train.lance"])


def cut(*arguments, **options):
    raise KeyboardInterrupt


def cut_off(monkeypatch, owner, name, call):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, cut)
        with pytest.raises(KeyboardInterrupt):
            call()


def test_lost_data_files_are_made_again(work, out, capsys):
    folder = half(work, out)
    if work is building:
        shutil.rmtree(out / "train.lance")
    else:
        data_files(out, folder)[-1].unlink()
    assert_finished(work, out)
    assert "1 of 2 finished blocks are damaged or have lost their files" in capsys.readouterr().err


def test_a_file_that_goes_before_the_commit_stops_it(work, out, monkeypatch):
    commit = work.WORK.commit

    def late(self):
        data_files(out, self.folder)[-1].write_bytes(b"")
        return commit(self)

    with monkeypatch.context() as patch:
        patch.setattr(work.WORK, "commit", late)
        words = r"\.lance is damaged or gone, .*nothing is committed"
        refused(lambda: work.run(out, ROWS), words)
    assert work.untouched(out)
    assert_finished(work, out)


@pytest.mark.parametrize("content", ["", '{"batch": 4', "[]", "null "])
def test_a_damaged_recipe_is_named_and_a_damaged_record_made_again(work, out, content):
    folder = half(work, out)
    recipe = (folder / "recipe.json").read_bytes()
    write(folder / "recipe.json", content)
    refused(lambda: work.run(out, ROWS), "recipe.json is damaged.*give --restart to begin anew")
    write(folder / "recipe.json", recipe)
    write(folder / "000001.json", content)
    assert_finished(work, out)


def test_a_beginning_of_other_keys_is_refused_and_restart_throws_it_away(work, out, monkeypatch):
    folder = half(work, out)
    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    key = "labels" if work is building else "weights"
    del recipe[key]
    write(folder / "recipe.json", json.dumps(recipe))
    words = f"another recipe \\({key}: not recorded, now '.*give --restart to begin anew"
    refused(lambda: work.run(out, ROWS), words)
    with monkeypatch.context() as patch:  # a launch that torchrun restarts goes on
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        refused(lambda: work.run(out, ROWS, restart=True), words)
    before = data_files(out, folder)
    assert work.run(out, ROWS, restart=True) == ROWS
    assert not before[-1].exists() and work.verify(out) in (ROWS, None)
    kept = work.content(out)
    refused(lambda: work.run(out, ROWS, restart=True), work.TAKEN)
    assert work.content(out) == kept


def test_a_beginning_half_thrown_away_is_not_gone_on_with(work, out, monkeypatch):
    changes, _ = work.ANOTHER
    folder = half(work, out, **changes)
    cut_off(monkeypatch, Path, "unlink", lambda: ledger.discard(folder))
    assert (folder / "000001.json").exists() and ledger.is_discarded(folder)
    assert_finished(work, out)


def test_what_a_kill_after_the_commit_leaves_is_cleared(work, out, monkeypatch):
    cut_off(monkeypatch, ledger.Ledger, "remove", lambda: work.run(out, ROWS))
    assert (out / work.FOLDER / "000000.json").exists()
    if work is extracting:  # another column is next
        assert work.run(out, ROWS, name="other") == ROWS
    refused(lambda: work.run(out, ROWS), work.TAKEN)
    assert not (out / work.FOLDER).exists()
    work.verify(out)


def test_two_launches_at_once_are_one_too_many(work, out):
    folder = out / work.FOLDER
    with lock.hold(folder):
        refused(lambda: work.run(out, ROWS), f"{folder} is in use by process {os.getpid()}")
        half(work, out)
    assert_finished(work, out)


@pytest.mark.parametrize("name, words", [("made_up", "made_up already"), ("other", "a moment ago")])
def test_what_is_committed_before_the_lock_is_held_counts(tmp_path, monkeypatch, name, words):
    extracting.begin(tmp_path, 6)
    hold = lock.hold

    def late(*arguments):
        monkeypatch.setattr(lock, "hold", hold)
        extracting.run(tmp_path, 6)
        return hold(*arguments)

    monkeypatch.setattr(lock, "hold", late)
    refused(lambda: extracting.run(tmp_path, 6, name=name), words)
    assert not (tmp_path / extracting.FOLDER).exists()


def restarted(world, work, out):
    """Begin anew as one of several processes, which have met already."""
    module = {"building": building, "extracting": extracting}[work]
    fragments.session = lambda: contextlib.nullcontext(world)
    return module.run(out, ROWS, rank=world.rank, world_size=world.size, restart=True)


def test_several_processes_begin_anew_together(work, out, ranks):
    changes, _ = work.ANOTHER
    half(work, out, **changes)
    assert ranks(restarted, work.__name__.rpartition(".")[2], out) == [ROWS, None]
    work.verify(out)


def test_another_process_waits_until_a_leftover_is_cleared(tmp_path, monkeypatch):
    extracting.begin(tmp_path, ROWS)
    cut_off(monkeypatch, ledger.Ledger, "remove", lambda: extracting.run(tmp_path, ROWS))
    folder, slept = tmp_path / extracting.FOLDER, []

    def clear(seconds):
        slept.append(seconds)
        if slept == [0.5, 0.5]:
            shutil.rmtree(folder)

    monkeypatch.setattr(ledger.time, "sleep", clear)
    half(extracting, tmp_path, name="other")
    assert slept[:3] == [0.5, 0.5, 0.0] and [path.name for path in folder.glob("0*.json")] == [
        "000001.json"
    ]


def test_skipping_bad_images_may_follow_an_error_and_not_precede_it(tmp_path):
    refused(lambda: building.run(tmp_path / "a", bad=(13,)), "image 13")
    records = sorted((tmp_path / "a" / building.FOLDER).glob("0*.json"))
    assert records
    times = [record.stat().st_mtime_ns for record in records]
    half(building, tmp_path / "a", building.ROWS, bad=(13,), on_bad_image="skip")
    assert [record.stat().st_mtime_ns for record in records] == times
    assert building.run(tmp_path / "a", bad=(13,), on_bad_image="skip") == building.ROWS - 1
    folder = half(building, tmp_path / "b", bad=(7,), on_bad_image="skip")
    words = (
        f"{folder}: block 1 has left out 1 of its images .*image 7.*--on-bad-image skip, or give"
    )
    refused(lambda: building.run(tmp_path / "b", ROWS, bad=(7,)), words)


def test_corrected_labels_are_another_recipe(tmp_path):
    for number in range(2):
        write(tmp_path / "flat" / f"{number}.png", saved(rgb(seed=number)))
    bad, labels = write(tmp_path / "flat" / "2.png", b"x"), tmp_path / "labels.txt"
    paths = {"data_dir": str(tmp_path / "flat"), "out": str(tmp_path), "labels": str(labels)}

    def prepare(**changes):
        return prepare_images(ImagesConfig(vae="none", resolution=8, **paths, **changes))

    write(labels, "0\n1\n1\n")
    refused(prepare, "2.png")
    write(labels, "1\n0\n0\n")
    refused(
        prepare, r"another recipe \(labels: '\w{16}', now '\w{16}'\); .*--restart to begin anew"
    )
    write(bad, saved(rgb(seed=2)))
    assert "3 rows" in prepare(restart=True)
    assert LatentDataset(tmp_path).rows(np.arange(3))["label"].tolist() == [1, 0, 0]


def flat(folder, labels):
    for name in ("a.jpg", "b.jpg"):
        write(folder / "flat" / name)
    return open_source(folder / "flat", labels=write(folder / "labels.txt", labels))


def members(folder, label):
    return open_source(tar(folder / "a.tar", {"a.jpg": b"x", "a.cls": label}), classes=["a", "b"])


def parquet(folder, labels, image=b"x"):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = {"image": pa.array([image, image]), "label": pa.array(labels)}
    parquet.write_table(pa.table(rows), folder / "a.parquet")
    return open_source(folder / "a.parquet")


DIFFERENT = {
    "a label": (lambda d: flat(d, "0\n1"), lambda d: flat(d, "1\n0"), {"labels"}),
    "a label of a shard": (lambda d: members(d, b"0"), lambda d: members(d, b"1"), {"labels"}),
    "a label of a file": (lambda d: parquet(d, [0, 1]), lambda d: parquet(d, [1, 0]), {"labels"}),
    "images of a file": (
        lambda d: parquet(d, [0, 1]),
        lambda d: parquet(d, [0, 1], bytes(99)),
        {"names"},
    ),
    "a name": (
        lambda d: open_source(tree(d)),
        lambda d: (d / "dog" / "a.jpg").rename(d / "dog" / "b.jpg") and open_source(d),
        {"names"},
    ),
    "a file's time": (
        lambda d: open_source(tree(d)),
        lambda d: os.utime(d / "dog" / "a.jpg", (0, 0)) or open_source(d),
        set(),
    ),
    "a subset": (
        lambda d: Subset(flat(d, "0\n1"), 1, 0),
        lambda d: Subset(flat(d, "0\n1"), 1, 1),
        {"subset"},
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_a_source_is_known_by_names_and_labels(tmp_path, case):
    before, after, changed = DIFFERENT[case]
    old, new = before(tmp_path).identity(), after(tmp_path).identity()
    assert {name for name in old if old[name] != new[name]} == changed


def test_weights_are_known_by_their_bytes(tmp_path):
    digest = fragments.weights_digest
    file = write(tmp_path / "vae" / "w.safetensors", b"one")
    write(tmp_path / "vae" / "README.md", b"one")
    of_file, of_folder = digest(str(file)), digest(str(tmp_path / "vae"))
    assert of_file and of_folder and digest("") == digest("owner/name") == ""
    os.utime(file, (0, 0))
    write(tmp_path / "vae" / "README.md", b"two")
    assert (digest(str(file)), digest(str(tmp_path / "vae"))) == (of_file, of_folder)
    write(file, b"two")
    assert digest(str(file)) != of_file and digest(str(tmp_path / "vae")) != of_folder


def test_other_weights_of_an_encoder_are_another_recipe(tmp_path, monkeypatch):
    pixels = np.zeros((2, 16, 16, 3), np.uint8)
    rows = zip(map(dataset.encode, pixels), digits.pixel_moments(pixels), (0, 1), strict=True)
    made = ({"image": image, "moments": moments, "label": label} for image, moments, label in rows)
    dataset.write(tmp_path / "train.lance", made, digits.digits_metadata())
    monkeypatch.setattr(encoders, "load", lambda *_: lambda x: torch.zeros(len(x), 16, 96))
    file = tmp_path / "weights.pth"
    settings = {"data_dir": str(tmp_path), "enc_type": "digits-vit", "enc_weights": str(file)}

    def prepare(weights, **changes):
        write(file, weights)
        return prepare_features(FeaturesConfig(batch_size=2, **settings, **changes))

    cut_off(monkeypatch, extracting.WORK, "commit", lambda: prepare(b"one"))
    refused(lambda: prepare(b"two"), r"recipe \(weights: '\w{16}', now '\w{16}'\); .*--restart")
    assert "2 rows" in prepare(b"two", restart=True)


@pytest.mark.parametrize("content", ["", "[{", "{}", '[{"rows": 1}]', "[3]"])
def test_a_damaged_file_of_checks_is_named(tmp_path, content):
    file = write(tmp_path / "train.blocks.json", content)
    if content == "{}":
        assert fragments.read_checks(file, "content", "images") == []
    else:
        words = f"{file} is damaged .*expected what prepare images wrote"
        refused(lambda: fragments.read_checks(file, "content", "images"), words)


@pytest.mark.parametrize("damage", ["gone", "cut", "zeros"])
def test_verify_names_a_data_file_that_is_gone_or_damaged(work, tmp_path, damage):
    work.begin(tmp_path, 6)
    work.run(tmp_path, 6)
    file = max((tmp_path / "train.lance" / "data").iterdir(), key=lambda path: path.stat().st_size)
    content, words = file.read_bytes(), f"{file.name} of .* is damaged or gone"
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(bytes(50) + content[50:])
        words = "rows 0 to 5"
    if damage != "zeros" or work is building:  # features are in another file than images
        refused(lambda: work.verify(tmp_path), words)


@pytest.mark.parametrize("name", [".", "data"])
def test_nothing_is_written_or_removed_through_a_link(work, out, tmp_path, name):
    """A link in the place of the ledger, or of the table's data, leads anywhere."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "recipe.json").write_text("mine")
    if name == "data":
        link = out / "train.lance" / "data"
        link.parent.mkdir(exist_ok=True)
        shutil.rmtree(link, ignore_errors=True)
    else:
        link = out / work.FOLDER
    link.symlink_to(theirs)
    for restart in (False, True):
        refused(lambda: work.run(out, ROWS, restart=restart), rf"{link.name} is a link")  # noqa: B023
    assert [path.name for path in theirs.iterdir()] == ["recipe.json"]
    assert (theirs / "recipe.json").read_text() == "mine"


@pytest.mark.parametrize("record", ["[1]", "5", '{"rows": 6, "crc32": 1, "fragments": [3]}'])
def test_a_record_that_is_none_is_made_again(work, out, record):
    folder = half(work, out)
    (folder / "000001.json").write_text(record)
    assert_finished(work, out)
