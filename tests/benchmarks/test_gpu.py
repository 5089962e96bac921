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

QUICK = ("this",)
FAILS = ("json.tool", "/nowhere")


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(seconds, card="a card", work="work") -> a queue whose committed rows are none."""
    monkeypatch.setattr(queue, "RESULTS", tmp_path / "committed")

    def new(seconds, card="a card", work="work"):
        return Queue(seconds, tmp_path / "out", tmp_path / work, card)

    return new


def names(tar):
    with tarfile.open(tar) as file:
        return file.getnames()


def test_items_run_in_order_and_each_is_packed(make, tmp_path):
    rows = make(60).run([Item("one", 1, QUICK), Item("two", 1, FAILS)])
    assert [(row["item"], row["state"]) for row in rows] == [("one", "ok"), ("two", "failed")]
    found = names(tmp_path / "out" / TAR)
    assert {"logs/one.log", "logs/two.log", QUEUE} <= set(found)
    with tarfile.open(tmp_path / "out" / TAR) as file:
        assert b"Namespaces" in file.extractfile("logs/one.log").read()


def test_a_second_run_passes_over_what_has_rows_and_repeats_what_failed(make):
    items = [Item("one", 1, QUICK), Item("two", 1, FAILS)]
    make(60).run(items)
    again = make(60, work="elsewhere").run(items)
    assert [row["state"] for row in again] == ["has rows", "failed"]


def test_rows_count_for_their_card_and_their_sources_alone(make, monkeypatch):
    item = Item("one", 1, QUICK)
    make(60, card="pretended").run([item])
    assert make(60, work="real").run([item])[0]["state"] == "ok"
    monkeypatch.setattr("benchmarks.gpu.items.sources", lambda: "changed")
    assert make(60, work="changed").run([item])[0]["state"] == "ok"


def test_committed_rows_count_too(make, tmp_path):
    item = Item("one", 1, QUICK)
    folder = tmp_path / "committed" / "a-card" / "2026-01-01_gpu"
    folder.mkdir(parents=True)
    row = {"item": "one", "key": item.key, "state": "ok", "device": "a card"}
    (folder / QUEUE).write_text(json.dumps(row) + "\n")
    assert make(60).run([item])[0]["state"] == "has rows"


def test_nothing_begins_that_cannot_end_and_what_does_not_end_is_stopped(make, tmp_path):
    sleeper = ("timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)")
    started = time.monotonic()
    rows = make(12).run([Item("sleeper", 1, sleeper, limit=2), Item("long", 30, QUICK)])
    assert [row["state"] for row in rows] == ["stopped", "no time"]
    assert time.monotonic() - started < 12
    assert "logs/sleeper.log" in names(tmp_path / "out" / TAR)


def test_without_what_the_card_needs_nothing_is_measured(make):
    rows = make(60).run([Item("card", 1, FAILS), Item("one", 1, QUICK)])
    assert [row["state"] for row in rows] == ["failed"]


def test_an_item_that_lacks_something_is_left_out(make, monkeypatch):
    monkeypatch.delenv("REPA_OFFICIAL", raising=False)
    (row,) = make(60).run([Item("recipe", 1, QUICK, needs="REPA_OFFICIAL")])
    assert row["state"] == "left out" and row["message"] == "REPA_OFFICIAL is not set"


def test_what_no_pretended_card_can_do_is_left_out_of_a_rehearsal(make):
    item = Item("sanitizer", 1, QUICK, unpretended="it has no driver")
    (row,) = make(60, card="pretended").run([item])
    assert (row["state"], row["message"]) == ("left out", "it has no driver")
    assert make(60).run([item])[0]["state"] == "ok"


@pytest.mark.parametrize(
    "state, lost", [("ok", False), ("has rows", False), ("failed", True), ("no time", True)]
)
def test_a_rehearsal_is_right_where_all_ran(make, tmp_path, capsys, state, lost):
    rows = [
        {"item": "step", "state": state, "seconds": 1.0},
        {"item": "sanitizer", "state": "left out", "seconds": 0.0, "message": "no driver"},
    ]
    assert program.rehearsed(make(60, card="pretended"), rows) is lost
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


def test_an_item_runs_as_a_module_of_its_own():
    text = "import sys; print(sys.modules['__main__'].__spec__.name, sys.argv[1:])"
    command = [sys.executable, "-m", "benchmarks.gpu.process", "timeit", "-n1", "-r1", text]
    done = subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[0] == f"timeit {['-n1', '-r1', text]}"


def test_the_items_are_known_by_name_and_what_matters_comes_first(capsys):
    assert program.main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [item.name for item in ITEMS] and len(set(listed)) == len(listed)
    assert listed[:5] == ["card", "step", "tests", "recipe", "kernels"]
    with pytest.raises(ValueError, match="no item is called nothing; there are card"):
        by_name(["nothing"])


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


def optimizer_row(**changes):
    row = {"provider": "cuda", "tensors": 3, "status": "ok", "ms_p50": 5.0, "share_of_copy": 0.9}
    return {**row, "device": "NVIDIA H100 pretended", "date": "2026-01-01", **changes}


def packed(tmp_path, device):
    """A file as the queue leaves it, with rows of one optimizer."""
    work = tmp_path / "work"
    rows = work / "results" / "card" / "2026-01-01_optim" / "rows.jsonl"
    rows.parent.mkdir(parents=True)
    lines = [optimizer_row(device=device), optimizer_row(device=device, provider="stock", ms_p50=6)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (work / "logs").mkdir()
    (work / "logs" / "tests.log").write_text("FAILED tests/a.py::b\n1 failed, 2 passed\n")
    state = {"item": "tests", "state": "failed", "seconds": 3.0, "key": "k", "date": "2026-01-01"}
    (work / QUEUE).write_text(json.dumps({**state, "device": device}) + "\n")
    queue.Queue(1, tmp_path, work, device).pack()
    return tmp_path / TAR


def test_rows_come_home_once(tmp_path):
    tar, into = packed(tmp_path, "NVIDIA H100"), tmp_path / "results"
    for count in (2, 0):
        assert f"{count} rows" in home.bring(tar, into)[0]
    rows = (into / "card" / "2026-01-01_optim" / "rows.jsonl").read_text().splitlines()
    assert len(rows) == 2
    kept = into / "nvidia-h100" / "2026-01-01_gpu"
    assert "optim cuda: 5.00 ms 90% x1.20" in (kept / "tables.txt").read_text()
    assert "1 failed, 2 passed" in (kept / "tables.txt").read_text()
    assert len((kept / QUEUE).read_text().splitlines()) == 1


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
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(optimizer_row())}\n" * 1000)
    assert len(table.write(rows, tmp_path, tmp_path)) <= table.MOST
