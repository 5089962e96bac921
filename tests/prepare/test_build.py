import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from repa_fast import ledger
from repa_fast.data.dataset import LatentDataset
from repa_fast.prepare import build, fragments
from tests.prepare.building import Photographs, encode, recipe, run

ROOT = Path(__file__).parents[2]


def rows_of(out, split="train"):
    table = LatentDataset(out, split)
    rows = table.rows(np.arange(len(table)))
    return rows["image"], rows["moments"].tobytes(), rows["label"].tolist()


def start(out, rank=0, world_size=1, rows=45, seconds=0.0):
    """A build as a process; encoding a batch takes so many seconds."""
    numbers = map(str, (rank, world_size, rows))
    command = [sys.executable, "-m", "tests.prepare.building", str(out), *numbers]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ENCODE_SECONDS": str(seconds)}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert run(out) == 45
    return out


def test_rows_are_the_crops_of_the_images_in_order(whole):
    images, moments, labels = rows_of(whole)
    assert labels == [i % 3 for i in range(45)] and len(set(images)) == 45
    crops = [
        build.center_crop(Photographs(45).read(i).data, 8, "image").transpose(2, 0, 1)
        for i in range(45)
    ]
    assert moments == encode(np.stack(crops)).tobytes()
    table = LatentDataset(whole)
    for index in (0, 17, 44):
        sample = table.decode(table.fetch(np.array([index]))[0])
        assert np.array_equal(sample["image"], crops[index])


def test_nothing_but_the_table_and_its_checksums_is_left(whole):
    assert sorted(p.name for p in whole.iterdir()) == ["train.blocks.json", "train.lance"]
    blocks = json.loads((whole / "train.blocks.json").read_text())
    assert [block["rows"] for block in blocks] == [6] * 7 + [3]


def test_several_processes_give_the_same_table(whole, tmp_path):
    others = [start(tmp_path, rank, 3) for rank in (1, 2)]
    first = start(tmp_path, 0, 3)
    for process in (first, *others):
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    assert rows_of(tmp_path) == rows_of(whole)


def test_a_process_that_starts_after_the_table_is_made_has_nothing_to_do(tmp_path):
    assert run(tmp_path, rows=5, rank=0, world_size=2) == 5  # one block, the first process's
    assert run(tmp_path, rows=5, rank=1, world_size=2) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.blocks.json", "train.lance"]


@pytest.mark.usefixtures("heavy")
def test_killed_at_twenty_random_moments_and_gone_on_with(tmp_path):
    generator = random.Random(0)
    rows, killed, done = 300, tmp_path / "killed", 0

    def finished():
        return len(list(killed.glob(".train.building/[0-9]*.json")))

    for _ in range(20):
        process = start(killed, rows=rows, seconds=0.1)
        deadline = time.monotonic() + 60
        while finished() <= done:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.4))  # within one of the next blocks, of 0.2 s each
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = finished()
    assert 20 <= done < rows // 6
    assert run(killed, rows) == rows
    run(tmp_path / "whole", rows)
    assert rows_of(killed) == rows_of(tmp_path / "whole")
    assert build.verify(killed, "train") == rows


@pytest.mark.parametrize("moment", ("rows", "record", "commit"))
@pytest.mark.parametrize("block", (0, 3, 7))
def test_cut_off_in_a_block_it_goes_on_without_duplicates_or_holes(
    whole, tmp_path, monkeypatch, moment, block
):
    class Cut(Exception):
        pass

    def cut(*arguments, **options):
        raise Cut

    write = build.Building.write

    def write_until(building, number, *arguments):
        if number == block and moment == "rows":
            raise Cut
        if number == block and moment == "record":
            monkeypatch.setattr(ledger, "write_whole", cut)
        write(building, number, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(build.Building, "write", write_until)
        if moment == "commit":
            patch.setattr(build.Building, "commit", cut)
        with pytest.raises(Cut):
            run(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no dataset"):
        LatentDataset(tmp_path)
    assert run(tmp_path) == 45
    assert rows_of(tmp_path) == rows_of(whole)
    files = list((tmp_path / "train.lance" / "data").iterdir())
    assert len(files) == 8


def test_a_bad_image_stops_with_its_name(tmp_path):
    with pytest.raises(ValueError, match="image 13"):
        run(tmp_path, bad=(13,))


def test_bad_images_are_left_out_and_recorded_when_asked(tmp_path, whole):
    assert run(tmp_path, bad=(6, 7, 8, 9, 10, 11, 20), on_bad_image="skip") == 38
    kept = [i for i in range(45) if i not in (6, 7, 8, 9, 10, 11, 20)]
    images, _, labels = rows_of(tmp_path)
    everything = rows_of(whole)
    assert images == [everything[0][i] for i in kept] and labels == [i % 3 for i in kept]
    blocks = json.loads((tmp_path / "train.blocks.json").read_text())
    assert blocks[1]["rows"] == 0 and [len(b["skipped"]) for b in blocks][:4] == [0, 6, 0, 1]
    assert "image 20" in blocks[3]["skipped"][0]
    assert build.verify(tmp_path, "train") == 38


def test_no_good_image_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no good image"):
        run(tmp_path, rows=5, bad=range(5), on_bad_image="skip")


def test_another_recipe_cannot_go_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(build.Building, "commit", lambda building: None)
        run(tmp_path)
    with pytest.raises(ValueError, match=r"quality: 95, now 90"):
        run(tmp_path, quality=90)


def test_a_finished_table_is_not_overwritten(whole):
    with pytest.raises(ValueError, match="exists already"):
        run(whole)


def test_train_and_val_lie_side_by_side(tmp_path):
    run(tmp_path, rows=7)
    run(tmp_path, rows=4, split="val")
    assert len(LatentDataset(tmp_path)) == 7 and len(LatentDataset(tmp_path, "val")) == 4


def test_a_full_disk_keeps_what_is_written(tmp_path, monkeypatch, whole):
    write = build.Building.write

    def write_until(building, number, *arguments):
        if number == 4:
            raise OSError("LanceError(IO): No space left on device (os error 28)")
        write(building, number, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(build.Building, "write", write_until)
        with pytest.raises(RuntimeError, match="4 of 8 blocks are written and kept"):
            run(tmp_path)
    assert run(tmp_path) == 45
    assert rows_of(tmp_path) == rows_of(whole)


def test_verify_finds_a_changed_byte_and_a_missing_row(tmp_path):
    run(tmp_path)
    record = tmp_path / "train.blocks.json"
    blocks = json.loads(record.read_text())
    blocks[2]["crc32"] ^= 1
    record.write_text(json.dumps(blocks))
    with pytest.raises(ValueError, match=r"rows 12 to 17 \(block 2\)"):
        build.verify(tmp_path, "train")
    blocks[2]["crc32"] ^= 1
    blocks[5]["rows"] += 1
    record.write_text(json.dumps(blocks))
    with pytest.raises(ValueError, match="has 45 rows, expected 46"):
        build.verify(tmp_path, "train")


def test_progress_counts_all_images(tmp_path):
    seen = []
    building = build.Building(Photographs(20), tmp_path, "train", recipe(20), encode)
    building.run(workers=2, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 20


def test_results_come_in_order_and_not_too_far_ahead():
    from concurrent.futures import ThreadPoolExecutor

    started = []

    def double(i):
        started.append(i)
        return 2 * i

    with ThreadPoolExecutor(1) as pool:
        results = fragments.ahead(pool, double, range(100), depth=5)
        assert [next(results) for _ in range(3)] == [0, 2, 4]
        time.sleep(0.1)
        assert max(started) <= 8
        results.close()
