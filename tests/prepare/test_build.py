"""What a build writes; how it is cut off and goes on is in test_resuming.py."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from repa_fast.data.dataset import LatentDataset
from repa_fast.data.loader import read_batch
from repa_fast.prepare import build, fragments
from tests.prepare.building import Photographs, content, encode, run
from tests.refusals import refused


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert run(out) == 45
    return out


def test_rows_are_the_crops_of_the_images_in_order(whole):
    images, moments, labels = content(whole)
    assert labels == [i % 3 for i in range(45)] and len(set(images)) == 45
    files = [Photographs(45).read(i).data for i in range(45)]
    crops = [build.center_crop(file, 8, "image").transpose(2, 0, 1) for file in files]
    assert moments == encode(np.stack(crops)).tobytes()
    decoded = read_batch(LatentDataset(whole), np.array([0, 17, 44]))["image"]
    assert np.array_equal(decoded, [crops[index] for index in (0, 17, 44)])


def test_bad_images_are_left_out_and_recorded_when_asked(tmp_path, whole):
    bad = (6, 7, 8, 9, 10, 11, 20)
    assert run(tmp_path, bad=bad, on_bad_image="skip") == 38
    kept = [i for i in range(45) if i not in bad]
    images, _, labels = content(tmp_path)
    everything = content(whole)[0]
    assert images == [everything[i] for i in kept] and labels == [i % 3 for i in kept]
    blocks = json.loads((tmp_path / "train.blocks.json").read_text())
    assert blocks[1]["rows"] == 0 and [len(b["skipped"]) for b in blocks][:4] == [0, 6, 0, 1]
    assert "image 20" in blocks[3]["skipped"][0]
    assert build.verify(tmp_path, "train") == 38


def test_a_bad_image_stops_with_its_name_and_no_good_one_is_an_error(tmp_path):
    refused(lambda: run(tmp_path / "a", bad=(13,)), "image 13")
    refused(lambda: run(tmp_path, rows=5, bad=range(5), on_bad_image="skip"), "no good image")


def test_train_and_val_lie_side_by_side_and_progress_counts_all_images(tmp_path):
    seen = []
    assert run(tmp_path, rows=20, progress=seen.append) == 20
    assert seen == sorted(seen) and seen[-1] == 20
    run(tmp_path, rows=4, split="val")
    assert len(LatentDataset(tmp_path)) == 20 and len(LatentDataset(tmp_path, "val")) == 4


def test_results_come_in_order_and_not_too_far_ahead():
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
