"""Datasets at an S3 URL: the same batches as from the disk, or a clear error, whatever fails."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from repa_fast.data.dataset import LatentDataset
from repa_fast.data.loader import PREFETCHED_BATCHES, Loader
from repa_fast.data.open import open_dataset
from repa_fast.data.order import SampleOrder
from repa_fast.data.store import StoreError
from repa_fast.eval.info import InfoConfig, info
from tests.data import storing
from tests.data.encoding import assert_equal_batches, own_threads
from tests.data.storing import BROKEN, CUT, DENIED, SLOW_DOWN
from tests.refusals import refused

pytest.importorskip("lance")
pytest.importorskip("moto.server", reason="needs moto[server]")

ROOT = Path(__file__).parents[2]
BATCH = 16
URL = f"s3://{storing.BUCKET}/digits"


@pytest.fixture(scope="module")
def served(digits_dir):
    with storing.served(Path(digits_dir), "digits") as found:
        yield found


@pytest.fixture
def proxy(served, monkeypatch):
    endpoint, proxy = served
    environment = {"ENDPOINT_URL": endpoint, "ALLOW_HTTP": "true", "DEFAULT_REGION": "us-east-1"}
    environment |= {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret"}
    for name, value in environment.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    proxy.behave()
    return proxy


@pytest.fixture
def few_retries(monkeypatch):
    monkeypatch.setenv("OBJECT_STORE_CLIENT_MAX_RETRIES", "0")
    monkeypatch.setenv("LANCE_AIMD_MAX_RETRIES", "0")


def loader_of(dataset, stop=6, **options):
    return Loader(dataset, SampleOrder(len(dataset), BATCH, 0), start=0, stop=stop, **options)


@pytest.mark.parametrize(
    "url, split, name",
    [
        (f"{URL}/train.lance", "train", "train"),
        (URL, "train", "train"),
        (f"{URL}/", "val", "val"),
        (f"{URL}/val.lance", "train", "val"),
    ],
)
def test_rows_are_those_of_the_local_table(digits_dir, proxy, url, split, name):
    local = LatentDataset(f"{digits_dir}/{name}.lance")
    remote = open_dataset(url, split)
    assert remote.uri == f"{URL}/{name}.lance"
    assert remote.metadata == local.metadata and len(remote) == len(local)
    indices = np.array([len(local) - 1, 3, 3, 100])
    np.testing.assert_equal(remote.rows(indices), local.rows(indices))


def test_info_says_of_a_url_what_it_says_of_the_folder(digits_dir, proxy, few_retries, tmp_path):
    """Its labels come in one scan; a store that fails after opening is one line."""
    sheets = [str(tmp_path / name) for name in ("local.png", "remote.png")]
    local = info(InfoConfig(path=digits_dir, sheet=sheets[0]))
    remote = info(InfoConfig(path=URL, sheet=sheets[1]))
    assert remote == local.replace(digits_dir, URL).replace(sheets[0], sheets[1])
    assert Path(sheets[0]).read_bytes() == Path(sheets[1]).read_bytes()
    table = open_dataset(URL)
    proxy.behave()
    table.labels()
    assert proxy.requests < 10
    proxy.behave(storing.always(BROKEN))
    refused(table.labels, f"{URL}/train.lance: cannot read the column label", error=StoreError)


@pytest.mark.parametrize("faults", [(SLOW_DOWN, BROKEN), (CUT,)])
def test_batches_are_those_of_the_local_table_while_requests_fail(digits_dir, proxy, faults):
    proxy.behave(storing.at_first(*faults))
    batches = []
    for folder in (URL, digits_dir):
        with loader_of(open_dataset(folder), stop=3) as loader:
            batches.append(list(loader))
    assert proxy.failed >= len(batches[0]) == 3
    for remote, local in zip(*batches, strict=True):
        assert set(local) == {"index", "moments", "label", "image"}
        assert_equal_batches(remote, local)


@pytest.mark.parametrize(
    "fault, said",
    [(BROKEN, "500"), (SLOW_DOWN, "SlowDown"), (CUT, "body"), (DENIED, "InvalidAccessKeyId")],
)
def test_a_store_that_stays_down_ends_the_iteration(proxy, few_retries, fault, said):
    with loader_of(open_dataset(URL), skip_bad=True) as loader:
        batches = iter(loader)
        next(batches)
        start = time.monotonic()
        proxy.behave(storing.always(fault))
        words = (f"{URL}/train.lance", f"{BATCH} rows", said, "given up after", "AWS_ENDPOINT_URL")
        refused(lambda: list(batches), *words, error=StoreError)
        assert loader.skipped == []  # a failing store makes no row a bad one
    assert time.monotonic() - start < 5
    assert own_threads() == []


PROGRAM = f"""
from repa_fast.data.loader import Loader
from repa_fast.data.open import open_dataset
from repa_fast.data.order import SampleOrder
dataset = open_dataset({URL!r})
for batch in Loader(dataset, SampleOrder(len(dataset), {BATCH}, 0), start=0, stop=10_000):
    print("batch", flush=True)
"""


@pytest.mark.usefixtures("heavy")
def test_the_time_of_retries_is_set_by_the_environment_and_the_process_exits(proxy, monkeypatch):
    monkeypatch.setenv("OBJECT_STORE_CLIENT_RETRY_TIMEOUT", "1")
    monkeypatch.setenv("LANCE_AIMD_MAX_RETRIES", "0")
    proxy.behave(storing.always(BROKEN, after=40))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert ended.stdout.startswith("batch")
    assert ended.returncode == 1, ended.stderr  # a signal would be negative
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith(f"repa_fast.data.store.StoreError: {URL}/train.lance: cannot read")
    assert "retry_timeout: 1s" in last and "max_retries: 100" in last
    seconds = float(last.split("given up after ")[1].split(" s")[0])
    assert 4 <= seconds < 12  # 4 tries of a read, each of 1 s and the last wait of one


@pytest.mark.parametrize(
    "url, fault, words",
    [
        (f"s3://{storing.BUCKET}/none", None, ["no dataset at", "none/train.lance", "prepare"]),
        ("s3://elsewhere/digits", None, ["cannot open", "NoSuchBucket", "check the bucket's name"]),
        (URL, DENIED, ["cannot open", "403", "InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"]),
    ],
)
def test_what_cannot_be_opened_is_named(proxy, few_retries, url, fault, words):
    proxy.behave(storing.always(fault))
    message = refused(lambda: open_dataset(url))
    assert all(part in message for part in (url, *words)), message
    assert ("cannot open" in message) == ("cannot open" in words)
    assert ".rs:" not in message


def test_an_endpoint_that_does_not_answer_is_no_missing_dataset(proxy, few_retries, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    refused(lambda: open_dataset(URL), f"{URL}/train.lance: cannot open it.*127.0.0.1:1/")


def test_what_nobody_consumes_is_read_no_further_ahead(proxy, monkeypatch):
    dataset = open_dataset(URL)
    begun, done, fetch = [], [], dataset.fetch

    def counted(indices, **options):
        begun.append(len(indices))
        fetched = fetch(indices, **options)
        done.append(len(indices))
        return fetched

    monkeypatch.setattr(dataset, "fetch", counted)
    with loader_of(dataset) as loader:
        for consumed in range(2):
            # those queued, one that waits for a place, and those that are gone
            most = [BATCH] * (PREFETCHED_BATCHES + 1 + consumed)
            deadline = time.monotonic() + 10
            while len(done) < len(most) and time.monotonic() < deadline:
                time.sleep(0.01)
            requests = proxy.requests
            time.sleep(0.3)
            assert begun == done == most and proxy.requests == requests
            next(iter(loader))
