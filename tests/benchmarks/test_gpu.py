"""The queue of GPU measurements, with items that need no GPU."""

import json
import subprocess
import sys
import tarfile
import time
from types import SimpleNamespace

import pytest

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import home, process, queue, table
from benchmarks.gpu.items import ITEMS, Item, by_name
from benchmarks.gpu.queue import QUEUE, TAR, Queue
from benchmarks.harness import environment
from benchmarks.harness.rows import append, read
from tests.refusals import refused

TEXT = "import sys; print(sys.modules['__main__'].__spec__.name, sys.argv[1:])"
FLAGS = ["-n1", "-r1", TEXT]
ONE, TWO = Item("one", 1, ("timeit", *FLAGS)), Item("two", 1, ("json.tool", "/nowhere"))
"""Items that run to their end, and fail."""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(seconds=60, card="a card", work="work") -> a queue whose committed rows are none."""
    monkeypatch.setattr(queue, "RESULTS", tmp_path / "committed")

    def new(seconds=60, card="a card", work="work"):
        return Queue(seconds, tmp_path / "out", tmp_path / work, card)

    return new


def states(rows):
    return [row["state"] for row in rows]


def test_items_run_in_order_and_each_is_packed_and_a_second_run_repeats_what_failed(make, tmp_path):
    """Each as a module of its own."""
    rows = make().run([ONE, TWO])
    assert [row["item"] for row in rows] == ["one", "two"] and states(rows) == ["ok", "failed"]
    with tarfile.open(tmp_path / "out" / TAR) as file:
        assert {"logs/one.log", "logs/two.log", QUEUE} <= set(file.getnames())
        log = file.extractfile("logs/one.log").read().decode()
    assert log.splitlines()[0] == f"timeit {FLAGS}"
    assert states(make(work="elsewhere").run([ONE, TWO])) == ["has rows", "failed"]


def test_committed_rows_count_for_their_card_and_their_sources_alone(make, tmp_path, monkeypatch):
    row = {"item": "one", "key": ONE.key, "state": "ok", "device": "a card"}
    append(tmp_path / "committed" / "a-card" / "2026-01-01_gpu" / QUEUE, row)
    for card in ("another card", "a third"):  # the second goes on from the rows of the first
        assert states(make(card=card, work=card).run([ONE])) == ["ok"]
    assert states(make(work="real").run([ONE])) == ["has rows"]
    monkeypatch.setattr("benchmarks.gpu.items.sources", lambda: "changed")
    assert states(make(work="changed").run([ONE])) == ["ok"]


def test_nothing_begins_that_cannot_end_and_what_does_not_end_is_stopped(make, tmp_path):
    sleeper = ("timeit", "-n1", "-r1", "import time; time.sleep(60)")
    started = time.monotonic()
    rows = make(12).run([Item("sleeper", 1, sleeper, limit=1), Item("long", 30, ONE.command)])
    assert states(rows) == ["stopped", "no time"]
    assert time.monotonic() - started < 12
    with tarfile.open(tmp_path / "out" / TAR) as file:
        assert "logs/sleeper.log" in file.getnames()


def test_without_what_the_card_needs_nothing_is_measured(make):
    assert states(make().run([Item("card", 1, TWO.command), ONE])) == ["failed"]


def test_what_lacks_something_is_left_out_and_what_no_pretended_card_can_do_of_a_rehearsal(
    make, monkeypatch
):
    monkeypatch.delenv("REPA_OFFICIAL", raising=False)
    recipe = Item("recipe", 1, ONE.command, needs="REPA_OFFICIAL")
    sanitizer = Item("sanitizer", 1, ONE.command, unpretended="it has no driver")
    rows = [*make().run([recipe]), *make(card="pretended").run([sanitizer])]
    assert states(rows) == ["left out"] * 2
    assert [row["message"] for row in rows] == ["REPA_OFFICIAL is not set", "it has no driver"]
    assert states(make().run([sanitizer])) == ["ok"]


@pytest.mark.parametrize(
    "state, lost", [("ok", False), ("has rows", False), ("failed", True), ("no time", True)]
)
def test_a_rehearsal_is_right_where_all_ran(make, capsys, state, lost):
    rows = [{"item": "step", "state": state, "seconds": 1.0}]
    rows += [{"item": "sanitizer", "state": "left out", "seconds": 0.0, "message": "no driver"}]
    assert program.rehearsed(make(card="pretended"), rows) is lost
    printed = capsys.readouterr().out.splitlines()
    assert f"step             {state:9}     1 s" in [line.ljust(34) for line in printed]
    assert "sanitizer        left out      0 s  no driver" in printed


def test_workers_that_compile_do_not_outlive_an_item(monkeypatch):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as worker:
        pool = SimpleNamespace(process=worker, running=True)
        module = SimpleNamespace(_pool_set=[pool, SimpleNamespace()])
        monkeypatch.setitem(sys.modules, "torch._inductor.async_compile", module)
        process.end_compile_workers()
        assert worker.poll() is not None and not pool.running


def test_the_items_are_known_by_name_and_what_matters_comes_first(capsys):
    assert program.main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [item.name for item in ITEMS] and len(set(listed)) == len(listed)
    assert listed[:5] == ["card", "step", "tests", "recipe", "kernels"]
    refused(lambda: by_name(["nothing"]), "no item is called nothing; there are card")


def test_the_sources_are_those_that_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    hashes = []
    for folder, text in (("kernels", "a"), ("kernels", "b"), ("docs", "c")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "x.py").write_text(text)
        environment.sources.cache_clear()
        hashes.append(environment.sources())
    environment.sources.cache_clear()
    assert hashes[0] != hashes[1] == hashes[2]


def optimizer_row(device="NVIDIA H100 pretended", **changes):
    row = {"provider": "cuda", "tensors": 3, "status": "ok", "ms_p50": 5.0, "share_of_copy": 0.9}
    return {**row, "device": device, "date": "2026-01-01", **changes}


def packed(tmp_path, device):
    """A file as the queue leaves it, with rows of one optimizer."""
    work = tmp_path / "work"
    rows = [optimizer_row(device), optimizer_row(device, provider="stock", ms_p50=6)]
    append(work / "results" / "card" / "2026-01-01_optim" / "rows.jsonl", *rows)
    (work / "logs").mkdir()
    (work / "logs" / "tests.log").write_text("FAILED tests/a.py::b\n1 failed, 2 passed\n")
    state = {"item": "tests", "state": "failed", "seconds": 3.0, "key": "k", "date": "2026-01-01"}
    append(work / QUEUE, {**state, "device": device})
    queue.Queue(1, tmp_path, work, device).pack()
    return tmp_path / TAR


def test_rows_come_home_once(tmp_path):
    tar, into = packed(tmp_path, "NVIDIA H100"), tmp_path / "results"
    for count in (2, 0):
        assert f"{count} rows" in home.bring(tar, into)[0]
    assert len(read(into / "card" / "2026-01-01_optim" / "rows.jsonl")) == 2
    kept = into / "nvidia-h100" / "2026-01-01_gpu"
    tables = (kept / "tables.txt").read_text()
    assert "optim cuda: 5.00 ms 90% x1.20" in tables and "1 failed, 2 passed" in tables
    assert len(read(kept / QUEUE)) == 1


def test_rows_of_a_pretended_card_stay_out_of_the_results(tmp_path, monkeypatch, capsys):
    tar = packed(tmp_path, "NVIDIA H100 pretended")
    monkeypatch.setattr(home, "RESULTS", tmp_path / "results")
    assert home.main([str(tar), "--into", str(tmp_path / "results")]) == 1
    assert "expected a real card's" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


def test_the_table_is_short_and_says_what_failed(tmp_path):
    (tmp_path / "step.log").write_text("Traceback\nValueError: no csrc\n")
    rows = [{"item": "step", "state": "failed", "seconds": 1.0}]
    text = table.write(rows, tmp_path, tmp_path)
    assert text.splitlines() == ["step:failed/1s", "step: ValueError: no csrc"]
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(optimizer_row())}\n" * 300)
    assert len(table.write(rows, tmp_path, tmp_path)) <= table.MOST
