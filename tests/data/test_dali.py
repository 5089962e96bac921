"""Batches decoded by DALI: Pillow's, bad rows included, and nothing left behind."""

import gc
import logging
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from repa_fast.backend import dispatch
from repa_fast.data import dali
from repa_fast.data.dali import GPU_MEAN, DaliDecoder, choose
from repa_fast.data.dataset import LatentDataset
from repa_fast.data.loader import Loader, read_batch
from repa_fast.data.official import OfficialFolder
from repa_fast.data.order import SampleOrder
from tests.data.encoding import (
    COUNT,
    R,
    assert_equal_batches,
    encode,
    noise,
    own_threads,
    write_table,
)

pytest.importorskip("lance")

ROOT = Path(__file__).resolve().parents[2]
BATCH = 6
BAD_ROW = 17
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def with_dali():
    reason = dali.why_not(gpu=False)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("dali") / "train.lance")


@pytest.fixture
def order():
    return SampleOrder(COUNT, BATCH, 0)


@pytest.fixture
def built(monkeypatch):
    """Weak references to the pipelines that were built."""
    pipelines, build = [], DaliDecoder._build

    def noted(self, batch):
        pipeline = build(self, batch)
        pipelines.append(weakref.ref(pipeline))
        return pipeline

    monkeypatch.setattr(DaliDecoder, "_build", noted)
    return pipelines


def destroyed(pipelines: list) -> bool:
    gc.collect()
    return all(reference() is None for reference in pipelines)


# Bad images


HALF_PNG = encode(noise(3))[:200]

BAD = {
    "no image": b"not an image",
    "empty": b"",
    "half a PNG": HALF_PNG,
    "half a JPEG": encode(noise(3), "JPEG")[:-60],
    "another size": encode(noise(3, side=R + 8)),
    "another size, turned": encode(noise(3)[: R // 2], "JPEG"),
}


def without_addresses(error: pytest.ExceptionInfo) -> str:
    return re.sub("0x[0-9a-f]+", "", str(error.value))


@pytest.mark.parametrize("kind", list(BAD))
def test_a_bad_image_is_named_or_replaced_as_with_pillow(with_dali, tmp_path, caplog, kind):
    bad = write_table(tmp_path / "a.lance", {BAD_ROW: BAD[kind], BAD_ROW + 1: BAD[kind]})
    indices, good = np.array([3, BAD_ROW, 8, BAD_ROW + 1]), np.array([1, 2, 3, 4])
    with DaliDecoder(R, 1, None) as decoder:
        with pytest.raises(ValueError) as by_pillow_alone:
            read_batch(bad, indices)
        with pytest.raises(ValueError, match=rf"a\.lance row {BAD_ROW}: ") as named:
            read_batch(bad, indices, decoder=decoder)
        assert without_addresses(named) == without_addresses(by_pillow_alone)
        expected_skips, skips = [], []
        expected = read_batch(bad, indices, skipped=expected_skips)
        assert_equal_batches(read_batch(bad, indices, decoder=decoder, skipped=skips), expected)
        assert len(skips) == len(expected_skips) == 3
        assert expected["index"].tolist() == [3, BAD_ROW + 2, 8, BAD_ROW + 2]
        assert "not DALI" not in caplog.text
        assert_equal_batches(read_batch(bad, good, decoder=decoder), read_batch(bad, good))


def test_other_errors_of_dali_are_not_the_images(with_dali, table, monkeypatch):
    with DaliDecoder(R, 1, None) as decoder:
        read_batch(table, np.arange(4), decoder=decoder)

        def run():
            raise RuntimeError("out of memory")

        monkeypatch.setattr(decoder._pipeline, "run", run)
        with pytest.raises(RuntimeError, match="out of memory"):
            read_batch(table, np.arange(4), decoder=decoder, skipped=[])


def test_bad_moments_are_named(with_dali, tmp_path, monkeypatch):
    table = write_table(tmp_path / "a.lance")
    fetch = LatentDataset.fetch

    def spoiled(self, indices, **options):
        return [
            row._replace(label=9) if row.index == 3 else row
            for row in fetch(self, indices, **options)
        ]

    monkeypatch.setattr(LatentDataset, "fetch", spoiled)
    with DaliDecoder(R, 1, None) as decoder, pytest.raises(ValueError, match="row 3: label is 9"):
        read_batch(table, np.arange(4), decoder=decoder)


# The loader


@pytest.mark.parametrize("num_workers", [1, 3])
def test_batches_are_pillows(with_dali, table, order, built, num_workers):
    options = {"start": 3, "stop": 12, "num_workers": num_workers}
    with Loader(table, order, decode="dali-cpu", **options) as loader:
        batches = list(loader)
    with Loader(table, SampleOrder(COUNT, BATCH, 0), decode="torch", **options) as loader:
        expected = list(loader)
    assert len(batches) == len(expected) == 9
    for got, wanted in zip(batches, expected):
        assert_equal_batches(got, wanted)
    assert len(built) == 1 and destroyed(built) and own_threads() == []


def test_no_pipeline_without_images(with_dali, table, order, built):
    with Loader(table, order, start=0, stop=3, images=False, decode="dali-cpu") as loader:
        assert all(set(batch) == {"index", "moments", "label"} for batch in loader)
    assert built == []


def test_leaving_early_destroys_the_pipeline(with_dali, table, order, built):
    def leave():
        with Loader(table, order, start=0, stop=10**6, decode="dali-cpu") as loader:
            for _ in loader:
                raise KeyError

    with pytest.raises(KeyError):
        leave()
    assert len(built) == 1 and destroyed(built) and own_threads() == []
    dropped = Loader(table, order, start=0, stop=10**6, decode="dali-cpu")
    next(iter(dropped))
    del dropped
    assert len(built) == 2 and destroyed(built) and own_threads() == []


def test_an_error_destroys_the_pipeline(with_dali, tmp_path, order, built):
    bad = write_table(tmp_path / "a.lance", {BAD_ROW: HALF_PNG})
    with pytest.raises(ValueError, match=rf"row {BAD_ROW}: "):
        list(Loader(bad, order, start=0, stop=100, decode="dali-cpu"))
    assert built and destroyed(built) and own_threads() == []


def test_skipping_rows_reads_on(with_dali, tmp_path, built):
    bad = write_table(tmp_path / "a.lance", {BAD_ROW: HALF_PNG})
    found = []
    for decode in ("dali-cpu", "torch"):
        order = SampleOrder(COUNT, BATCH, 0)
        with Loader(bad, order, start=0, stop=12, decode=decode, skip_bad=True) as loader:
            found.append((list(loader), loader.skipped))
    for got, expected in zip(*(batches for batches, _ in found), strict=True):
        assert_equal_batches(got, expected)
    assert found[0][1] == found[1][1] and len(found[0][1]) == 2
    assert len(built) > 1 and destroyed(built)


def test_official_folders(with_dali, tmp_path):
    files = [
        encode(noise(0)),
        encode(noise(1), "JPEG"),
        noise(2).transpose(2, 0, 1),
        encode(noise(3)),
    ]
    (tmp_path / "images" / "00000").mkdir(parents=True)
    (tmp_path / "vae-sd" / "00000").mkdir(parents=True)
    labels = []
    for index, (file, suffix) in enumerate(zip(files, ("png", "jpg", "npy", "png"))):
        image = tmp_path / "images" / "00000" / f"img{index:08d}.{suffix}"
        np.save(image, file) if suffix == "npy" else image.write_bytes(file)
        name = f"00000/img-mean-std-{index:08d}.npy"
        np.save(tmp_path / "vae-sd" / name, np.zeros((8, R // 8, R // 8), np.float32))
        labels.append(f'["{name}", {index % 2}]')
    (tmp_path / "vae-sd" / "dataset.json").write_text(f'{{"labels": [{", ".join(labels)}]}}')
    folder, indices = OfficialFolder(tmp_path), np.array([2, 0, 3, 1])
    with DaliDecoder(R, 2, None) as decoder:
        samples, pixels = decoder.decode(folder, folder.fetch(indices), map)
        assert [sample["index"] for sample in samples] == indices.tolist()
        assert torch.equal(pixels, read_batch(folder, indices)["image"])
        np.save(tmp_path / "images" / "00000" / "img00000002.npy", np.zeros((3, R, R)))
        with pytest.raises(ValueError, match=r"img00000002\.npy: float64"):
            read_batch(folder, indices, decoder=decoder)
        (tmp_path / "images" / "00000" / "img00000002.npy").unlink()
        with pytest.raises(ValueError, match=r"img00000002\.npy: cannot be read"):
            read_batch(folder, indices, decoder=decoder)


# The choice


PACKAGES = [
    ("12.8", "nvidia-dali-cuda120"),
    ("13.2", "nvidia-dali-cuda130"),
    (None, "nvidia-dali-cuda130"),
]


@pytest.fixture
def without_dali(monkeypatch):
    for name in ("nvidia.dali", "nvidia.dali.plugin", "nvidia.dali.plugin.pytorch"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    "cuda, package",
    [
        ("12.8", "nvidia-dali-cuda120"),
        ("13.2", "nvidia-dali-cuda130"),
        (None, "nvidia-dali-cuda130"),
    ],
)
@pytest.mark.parametrize("decode, device", [("dali-cpu", CPU), ("dali-gpu", CUDA)])
def test_an_explicit_choice_without_dali_names_the_package(
    without_dali, monkeypatch, table, order, decode, device, cuda, package
):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(ValueError, match=rf"decode is '{decode}', but .*install {package} "):
        Loader(table, order, start=0, stop=1, decode=decode, device=device)
    assert own_threads() == []


def test_dali_of_another_cuda_is_refused_on_a_gpu(with_dali, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    if dali.why_not(gpu=True) == "":
        pytest.skip("DALI is of CUDA 12")
    assert choose("dali-cpu", CUDA) == "dali-cpu"
    with pytest.raises(ValueError, match="install nvidia-dali-cuda120"):
        choose("dali-gpu", CUDA)


def test_dali_on_a_gpu_needs_one():
    with pytest.raises(ValueError, match="run on cpu, expected one on CUDA"):
        choose("dali-gpu", CPU)


def test_an_unknown_decoder_is_refused():
    with pytest.raises(ValueError, match="decode is 'nvjpeg', expected one of auto"):
        choose("nvjpeg", CPU)


def test_auto_takes_pillow_and_says_why_once(without_dali, caplog):
    dispatch._say_once.cache_clear()
    with caplog.at_level(logging.INFO, dispatch.__name__):
        assert [choose("auto", CUDA), choose("auto", CUDA)] == ["torch", "torch"]
        assert "Pillow, since DALI is not there" in caplog.text and len(caplog.records) == 1
        assert [choose("auto", CPU), choose("auto", CPU)] == ["torch", "torch"]
        assert "Pillow, since the run is on cpu" in caplog.text and len(caplog.records) == 2


def test_auto_takes_dali_on_a_gpu(with_dali, monkeypatch, caplog):
    import nvidia.dali

    dispatch._say_once.cache_clear()
    major = str(nvidia.dali.__cuda_version__)[:2]
    monkeypatch.setattr(torch.version, "cuda", f"{major}.0")
    with caplog.at_level(logging.INFO, dispatch.__name__):
        assert choose("auto", CUDA) == "dali-gpu"
    assert "DALI on the GPU" in caplog.text


# Processes

# Nothing forks after lance is imported: the children import it, each for itself.
EXIT_SCRIPT = """
import os, signal, sys
import numpy, torch

ENDS = (0, 3, 1, 5, -signal.SIGTERM)

def fork_children():
    '''The number of a child, in it; None in the parent, with all children ended.'''
    children = {}
    for number in range(len(ENDS)):
        if (child := os.fork()) == 0:
            signal.alarm(60)
            return number
        children[number] = child
    codes = tuple(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children.values())
    assert codes == ENDS, codes
    print("ended as they should:", len(codes))
    return None

assert "lance" not in sys.modules
number = fork_children()
if number is not None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2) if number == 2 else None
    from repa_fast.data.dataset import LatentDataset
    from repa_fast.data.loader import Loader

    FORKS = ("os.fork", "os.forkpty", "os.posix_spawn", "subprocess.Popen", "os.system")

    def no_fork(event, arguments):
        if event in FORKS:
            os.write(2, f"{event} after lance is imported\\n".encode())
            os._exit(99)

    class Large:
        def rows(self, step, rank, world_size):
            return numpy.arange(400) % len(dataset)  # so that exiting meets DALI at work

    dataset = LatentDataset(sys.argv[1])
    sys.addaudithook(no_fork)
    loader = Loader(dataset, Large(), start=0, stop=10**6, num_workers=2, decode="dali-cpu")
    batches = iter(loader)
    for _ in range(1 + number):
        assert next(batches)["image"].shape == (400, 3, 32, 32)
    for task in os.listdir("/proc/self/task"):
        children = open(f"/proc/self/task/{task}/children").read()
        assert not children, children
    if number == 1:
        sys.exit(3)
    if number == 2:
        raise RuntimeError
    if number == 3:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
    if number >= 3:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
"""


def test_a_process_can_end_with_an_open_loader(with_dali, table):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", EXIT_SCRIPT, table.uri]
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "ended as they should: 5"
    assert process.stderr == ""


# On a GPU


@pytest.mark.gpu
def test_on_a_gpu_batches_are_ready(with_dali, table, order, built):
    options = {"start": 0, "stop": 60, "num_workers": 2}
    with Loader(
        table, order, decode="dali-gpu", device="cuda", pin_memory=True, **options
    ) as loader:
        sums = []
        for batch in loader:
            assert batch["image"].is_cuda and batch["moments"].is_pinned()
            torch.cuda._sleep(10**6)  # the step is still busy when its batch is let go
            sums.append(batch["image"].double().mean((1, 2, 3)))
        sums = torch.stack(sums).cpu()
    with Loader(table, SampleOrder(COUNT, BATCH, 0), decode="torch", **options) as loader:
        expected = torch.stack([batch["image"].double().mean((1, 2, 3)) for batch in loader])
    assert (sums - expected).abs().max() <= GPU_MEAN
    assert len(built) == 1 and destroyed(built)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", list(BAD))
def test_on_a_gpu_a_bad_image_is_named_or_replaced(with_dali, tmp_path, kind):
    bad = write_table(tmp_path / "a.lance", {BAD_ROW: BAD[kind]})
    indices = np.array([3, BAD_ROW, 8])
    with DaliDecoder(R, 1, CUDA) as decoder:
        with pytest.raises(ValueError, match=rf"a\.lance row {BAD_ROW}: "):
            read_batch(bad, indices, decoder=decoder)
        batch = read_batch(bad, indices, decoder=decoder, skipped=[])
        assert batch["index"].tolist() == [3, BAD_ROW + 1, 8]
