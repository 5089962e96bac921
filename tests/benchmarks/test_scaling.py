"""The model of scaling against sums by hand, simulated queues, and the committed page."""

import dataclasses
import math
import re
import sys

import pytest
from scipy import stats

from benchmarks.harness.rows import append
from benchmarks.paper import scaling
from benchmarks.paper import scaling_model as model
from benchmarks.step import ladder, traffic
from repa_fast.configs import presets

H200 = model.Machine()
NO_HOPS = {f"{kind}_{link}": 0.0 for kind in ("ring", "tree") for link in ("nvlink", "network")}
MODES = list(model.MODES)


def changed(**constants):
    return dataclasses.replace(H200, **constants)


@pytest.fixture(scope="module")
def work():
    return model.work(presets.get("sit-xl2-repa"))


@pytest.fixture(scope="module")
def step(work):
    """step(mode, gpus, batch, **constants of the machine)"""

    def made(mode, gpus, batch, **constants):
        return model.step(work, changed(**constants), model.MODES[mode], gpus, batch)

    return made


@pytest.fixture(scope="module")
def sent(work):
    """sent(mode, gpus, **constants of the machine), where hops take no time"""

    def made(mode, gpus, **constants):
        machine = changed(**NO_HOPS | constants)
        return model.communication(work, machine, model.MODES[mode], gpus)

    return made


def test_volumes_are_those_of_a_ring_on_which_every_rank_passes_on_all_parts_but_one():
    for ranks in (2, 3, 8):
        kinds = ("reduce-scatter", "all-gather", "all-reduce")
        found = [ranks * model.volume(kind, ranks) for kind in kinds]
        assert found == pytest.approx([ranks - 1, ranks - 1, 2 * (ranks - 1)])


@pytest.mark.parametrize("mode, total", (("ddp", 10.6), ("fsdp", 8.0), ("fsdp bf16", 5.3)))
def test_a_node_s_collectives_at_450_gb_per_second(sent, mode, total):
    """683 M parameters: 7/8 x 8, 6 and 4 bytes each."""
    found = sent(mode, 8, nvlink=450e9)
    assert 1e3 * (found.forward + found.backward) == pytest.approx(total, abs=0.05)


def test_an_all_reduce_takes_the_ring_or_the_tree_with_less_latency():
    machine = changed(ring_nvlink=1, ring_network=10, tree_nvlink=2, tree_network=30)
    assert model.latency("all-gather", 8, 1, machine) == 7
    assert model.latency("all-gather", 32, 4, machine) == 28 + 3 * 10
    assert model.latency("all-reduce", 8, 1, machine) == 2 * 7
    assert model.latency("all-reduce", 1024, 128, machine) == 2 * (7 * 2 + 7 * 30)
    assert model.latency("all-reduce", 4, 4, machine) == 2 * 3 * 10


@pytest.mark.parametrize("mode", MODES)
def test_nodes_share_their_network_and_only_replicas_cross_it(sent, mode):
    fast, slow = (sent(mode, 16, network=rate) for rate in (100e9, 50e9))
    assert slow.forward == pytest.approx((1 if "hsdp" in mode else 2) * fast.forward)


def test_links_work_side_by_side_but_for_one_piece(work, sent):
    """16 GPUs: 7/8 of the gradients inside a node, 2 x 1/2 of them across; 32: 2 x 3/4."""
    gradients = 4 * work.parameters / 1e9
    found = sent("hsdp", 16, nvlink=1e9, network=1e9)
    assert found.backward == pytest.approx(gradients * (1 + 7 / 8 / 29)) and found.end == 0
    across = sent("hsdp", 32, nvlink=1e30, network=1e9)
    assert across.backward == pytest.approx(2 * 3 / 4 * gradients)


@pytest.mark.parametrize("window, total", ((10.0, 3.0), (10.0, 10.0), (10.0, 40.0), (0.0, 4.0)))
@pytest.mark.parametrize("pieces", (1, 2, 7))
def test_what_shows_is_what_two_queues_make_of_it(window, total, pieces):
    """Backward each piece is computed, then reduced; forward it is gathered, then used."""
    for first, second in ((window, total), (total, window)):
        begun = done = 0.0
        for _ in range(pieces):
            begun += first / pieces
            done = max(done, begun) + second / pieces
        assert model.exposed(window, total, pieces) == pytest.approx(done - window)


def test_the_expected_maximum_is_the_mean_of_the_largest_order_statistic():
    for count in (1, 2, 3, 8, 10, 100, 1024):
        largest = stats.order_statistic(stats.Normal(), r=count, n=count)
        assert model.expected_maximum(count) == pytest.approx(largest.mean(), abs=1e-9)


@pytest.mark.parametrize("mode, shards", [*zip(MODES, (1, 64, 64, 8, 8))])
def test_one_gpu_waits_for_nobody_and_the_optimizer_moves_its_shard(work, step, mode, shards):
    alone = step(mode, 1, 32)
    assert alone.communication == alone.stragglers == 0 and alone == step("ddp", 1, 32)
    assert shards * step(mode, 64, 32).optimizer == pytest.approx(alone.optimizer)
    assert alone.optimizer == pytest.approx(40 * work.parameters / (0.85 * 4.3e12))


@pytest.mark.parametrize("tflops, terabytes", ((790, 4.3), (989, 3.35)))
@pytest.mark.parametrize("batch", (32, 256))
def test_the_floor_of_one_gpu(step, tflops, terabytes, batch):
    """FLOPs that were counted by hand, layer by layer, and bytes of Inductor's code."""
    found = step("ddp", 1, batch, matmul=1e12 * tflops, memory=1e12 * terabytes, reached=1.0)
    assert 1e3 * found.matmul == pytest.approx(0.7747 * batch / tflops * 1e3, rel=1e-3)
    kinds = ("elementwise", "stack")
    blocks = 28 * traffic.moved("block", 32, kinds=kinds) + traffic.moved("encoder", 32)
    assert found.elementwise == pytest.approx(blocks * batch / 32 / 1e12 / terabytes)


def test_flops_and_bytes_of_a_step(work):
    flops = work.frozen.flops + work.forward.flops + work.backward.flops
    assert 32 * flops == pytest.approx(24791e9, rel=1e-3)
    unit = 2 * 256 * 1152  # a bf16 tensor of tokens by width
    forward = work.forward.nbytes / (28 * unit)
    assert forward == pytest.approx(20, rel=0.01)  # 2 x (2 fp32, 2 bf16) and GELU's 8; vectors
    assert work.attention[1] == pytest.approx(28 * 12 * unit, rel=0.01)
    assert work.checkpoint_bytes == 16 * work.parameters
    assert work.image_bytes["moments"] == 4 * 8 * 32 * 32
    features = work.image_bytes["moments, fp16 features"] - work.image_bytes["moments"]
    assert features == 2 * 256 * 768


@pytest.mark.parametrize("mode", MODES)
def test_more_work_or_a_slower_machine_is_never_faster(step, mode):
    """But for the last bit, where launches hold the step up whatever the work."""
    rates = ("matmul", "memory", "reached", "nvlink", "network", "files", "files_node")
    costs = ("launches", "launch", "noise", *NO_HOPS)
    slower = [{name: getattr(H200, name) / 2} for name in rates]
    slower += [{name: getattr(H200, name) * 2} for name in costs]
    for gpus in (1, 8, 64, 1024):
        now = [step(mode, gpus, batch).seconds for batch in (1, 2, 8, 32, 256)]
        assert all(more >= less * (1 - 1e-14) for less, more in zip(now, now[1:]))
        assert now[-1] > now[0]
        for change in slower:
            assert step(mode, gpus, 2, **change).seconds >= now[1] * (1 - 1e-14), change


def test_ddp_only_gets_slower_with_gpus_and_sharding_helps_on_a_node(step):
    times = [step("ddp", gpus, 32).seconds for gpus in scaling.GPUS]
    assert times == sorted(times) and times[0] < times[-1]
    for mode in MODES[1:]:
        assert step(mode, 8, 32).seconds < step("ddp", 8, 32).seconds


def test_what_is_divided_what_is_not_and_what_holds_a_step_up(step):
    one, many = (step("fsdp", gpus, 256 / gpus) for gpus in (1, 32))
    assert 32 * many.matmul == pytest.approx(one.matmul)
    assert 32 * many.elementwise == pytest.approx(one.elementwise)
    assert many.seconds > one.seconds / 32
    two = step("ddp", 2, 32, noise=0.02)
    own = two.matmul + two.elementwise + two.copies + two.optimizer
    assert two.launches == 0
    assert two.stragglers == pytest.approx(0.02 * own / math.sqrt(math.pi))
    held = step("ddp", 1, 1, launch=1.0, noise=0.0)
    assert held.seconds - held.optimizer == pytest.approx(H200.launches)
    read = step("hsdp", 64, 32, files=1e9)
    assert read.seconds == pytest.approx(64 * 32 * (32768 + 16384) / 1e9)


def test_only_the_step_s_rows_from_gpus_are_measured_points(tmp_path, work, step):
    row = {"preset": "sit-xl2-repa", "batch": 32, "compile": True, "stall_ms": 0.1}
    row |= {"ms_p20": 61.0, "ms_p50": 62.0, "ms_p80": 63.0, "device": "NVIDIA H200"}
    row["commit"] = "abc1234"
    of_gpus = [row, row | {"preset": "sit-b2-repa"}, row | {"gpus": 8, "batch": 256, "rung": ""}]
    of_gpus += [row | {"rung": rung} for rung in ladder.RUNGS]
    append(tmp_path / "cpu/2026-11-21_step/rows.jsonl", row | {"device": "AMD EPYC"})
    append(tmp_path / "nvidia-h200/2026-11-22_step/rows.jsonl", *of_gpus)
    other = {"provider": "cuda", "ms_p50": 6.0}
    append(tmp_path / "nvidia-h200/2026-11-22_optim/rows.jsonl", other)
    *found, graphed = scaling.measured("sit-xl2-repa", tmp_path)
    assert [(each["gpus"], each["batch"]) for each in found] == [(1, 32), (8, 256)]
    assert graphed["rung"] == "graph"
    page = scaling.Page("sit-xl2-repa", H200, (32,), 256, work, found)
    table = "\n".join(scaling.measurements(page))
    assert table.count("| NVIDIA H200 |") == 2 and "| 62.00 |" in table
    assert f"| {1e3 * step('ddp', 1, 32).seconds:.2f} |" in table
    none = dataclasses.replace(page, rows=[])
    assert scaling.measurements(none) == ["No measured point exists yet."]


def test_the_committed_page_is_current(monkeypatch, tmp_path, work):
    monkeypatch.setattr(model, "work", lambda config: work)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["scaling", *map(str, flags)])
        return scaling.main()

    page = tmp_path / "scaling.md"
    assert run("--out", page) == 0
    text = page.read_text()
    assert text == scaling.PAGE.read_text(), "run `python -m benchmarks.paper.scaling`"
    assert (tmp_path / "images" / "scaling.png").stat().st_size > 10_000
    assert run("--check", "--out", page) == 0 and run("--check", "--noise", "0.02") == 1
    step = re.search(r"\| (\d\d\.\d\d) \|", text)[1]
    page.write_text(text.replace(step, "99.99"))
    assert run("--check", "--out", page) == 1
