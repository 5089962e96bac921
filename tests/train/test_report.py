"""What a run writes for people: metrics.jsonl, TensorBoard, the plot, rates and sample grids."""

import io
import json
import re
import sys
from functools import partial

import numpy as np
import pytest

from repa_fast.eval.pictures import plot_losses
from repa_fast.train import report
from repa_fast.train.report import (
    Clock,
    Reporter,
    TensorBoard,
    keep_until,
    read_metrics,
    summary,
)
from tests.refusals import refused


def reading(step: int = 1, **changes) -> dict:
    values = {"loss": 0.5 + 1 / step, "denoise": 0.75 + 1 / step, "grad_norm": 1.25}
    values |= {"align/digits-vit": -0.25, "loss_by_t": [*(0.1 * i for i in range(9)), None]}
    values |= {"skipped": 0, "images_per_second": 1234.4, "mfu": None, "eta_seconds": 3725.0}
    values |= {"learning_rate": 1e-4}
    return values | changes


@pytest.mark.parametrize(
    "step, end, kept",
    [
        (0, "", []),
        (25, "", [10, 20]),
        (30, '{"step": 40, "x": 80}\n', [10, 20, 30]),
        *((99, end, [10, 20, 30]) for end in ("", "{", '{"st', '{"step": 40, "x": 8')),
        (99, '{"step": 40, "x": 8\n', [10, 20, 30]),
        (99, '{"step": 40, "x": 80}', [10, 20, 30, 40]),
    ],
)
def test_lines_after_the_step_and_a_half_written_last_one_are_cut(tmp_path, step, end, kept):
    path = tmp_path / "metrics.jsonl"
    keep_until(path, step)
    assert list(tmp_path.iterdir()) == [], "no file is nothing to cut"
    path.write_text("".join(json.dumps({"step": s, "x": s * 2}) + "\n" for s in (10, 20, 30)) + end)
    keep_until(path, step)
    assert read_metrics(path) == [{"step": s, "x": 2 * s} for s in kept]
    assert path.read_text().count("\n") == len(kept)
    assert [path] == list(tmp_path.iterdir())


def test_a_bad_line_in_the_middle_is_an_error_with_file_and_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for line in (
        b'{"step"',
        b"[]",
        b"3",
        b'{"step": "1"}',
        b"{}",
        b'{"step": "\xff"}',
        b"[" * 10**5,
    ):
        text = b'{"step": 1}\n' + line + b'\n{"step": 3}\n'
        path.write_bytes(text)
        for call in (read_metrics, partial(keep_until, step=9)):
            refused(partial(call, path), r"metrics\.jsonl, line 2: ")
        assert path.read_bytes() == text


def test_a_resumed_run_reads_as_if_it_had_not_been_cut_off(tmp_path, capsys):
    for start, steps in ((0, [10, 20, 30]), (20, [30, 40])):
        reporter = Reporter(tmp_path, 40, start, None)
        reporter.line("device: a small one")
        for step in steps:
            reporter.metrics(step, reading(step))
        reporter.close()
        if start == 0:
            with open(tmp_path / "metrics.jsonl", "a") as file:
                file.write('{"step": 31, "lo')
    expected = [{"step": step, **reading(step)} for step in (10, 20, 30, 40)]
    assert read_metrics(tmp_path / "metrics.jsonl") == expected
    for text in (capsys.readouterr().out, (tmp_path / "log.txt").read_text()):
        assert text.count("device: a small one") == 2
        assert text.count(f"step 30/40  {summary(reading(30))}") == 2


def test_a_terminal_gets_every_line_above_a_bar(tmp_path, monkeypatch):
    """A line longer than the terminal is wide, and one with what rich would take for markup."""
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", terminal)
    for name, value in {"TERM": "xterm", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    reporter = Reporter(tmp_path, 40, 0, None)
    reporter.line("going on from [/bold]runs/a[red]")
    for step in (10, 20):
        reporter.metrics(step, reading(step, images_per_second=0.8519))
    reporter.close()
    parts = re.split(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]", terminal.getvalue())
    shown = [part.rstrip() for part in parts]
    logged = [line.split("  ", 1)[1] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line for line in shown if line in logged] == logged and len(logged) == 3
    assert "norm 1.2500  0.852 images/s  ETA 1:02:05" in logged[1]
    assert " loss 0.5500 align -0.250 0.852 images/s 1:02:05" in terminal.getvalue()


def test_scalars_can_be_read_back_from_tensorboard(tmp_path, capsys):
    """Those of a run resumed at 20: what came after is purged."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, steps, loss in ((0, [10, 20, 30], 0.5), (20, [30, 40], 2.0)):
        reporter = Reporter(tmp_path, 40, start, TensorBoard(tmp_path / "logs", start))
        for step in steps:
            reporter.metrics(step, reading(step, loss=loss, denoise=None if step == 20 else 1.0))
            if step == 20:
                reporter.image("samples", 20, np.full((8, 8, 3), 200, np.uint8))
        reporter.close()
    events = accumulator.EventAccumulator(str(tmp_path / "logs")).Reload()
    got = [(event.step, event.value) for event in events.Scalars("loss")]
    assert got == [(10, 0.5), (20, 0.5), (30, 2.0), (40, 2.0)]
    assert [event.step for event in events.Scalars("denoise")] == [10, 30, 40]
    tags = events.Tags()["scalars"]
    assert {"align/digits-vit", "grad_norm", "loss_by_t/0.0", "loss_by_t/0.8"} <= set(tags)
    assert events.Scalars("learning_rate")[0].value == pytest.approx(1e-4)
    assert "loss_by_t/0.9" not in tags and "mfu" not in tags
    assert events.Scalars("loss_by_t/0.3")[0].value == pytest.approx(0.3)
    assert [event.step for event in events.Images("samples")] == [20]


def plot(folder, name, readings) -> np.ndarray:
    """The plot's pixels, uint8 (H, W, 3)."""
    pytest.importorskip("matplotlib")
    from PIL import Image

    out = folder / f"{name}.png"
    plot_losses(readings, out)
    with Image.open(out) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).copy()


def test_the_plot_shows_the_losses_that_were_measured(tmp_path):
    falling = [{"step": s, **reading(s)} for s in range(1, 20)]
    rising = [{"step": s, **reading(20 - s)} for s in range(1, 20)]
    plain = [{k: v for k, v in line.items() if k != "align/digits-vit"} for line in falling]
    skipped = {"step": 20, **reading(20, loss=None, denoise=None), "align/digits-vit": None}
    picture = plot(tmp_path, "falling", falling)
    assert 0.005 < (picture.min(-1) < 250).mean() < 0.5
    assert not np.array_equal(picture, plot(tmp_path, "rising", rising))
    assert picture.shape[1] > 1.5 * plot(tmp_path, "plain", plain).shape[1]
    assert np.array_equal(plot(tmp_path, "skipped", [*falling, skipped]), picture)
    plot(tmp_path, "none", [skipped])


@pytest.fixture
def wait(monkeypatch):
    """Lets seconds pass on the clock's clock; returns when they began."""
    now = [100.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> float:
        now[0] += seconds
        return now[0] - seconds

    return wait


def test_the_clock_gives_rates_since_the_last_reading_without_pauses(wait):
    clock = Clock(images_per_step=8, train_flops=1e9, device_name="a laptop", world_size=1)
    for seconds, remaining, rate, left in ((4, 30, 20.0, 12.0), (1, 20, 80.0, 2.0)):
        wait(seconds)
        rates = {"images_per_second": rate, "eta_seconds": left}
        assert clock.read(10, remaining) == {"mfu": None, "stall_ms": 0} | rates
    for _ in range(2):
        wait(2)
        clock.pause(wait(50))
    assert clock.read(10, 10)["images_per_second"] == pytest.approx(20)
    wait(3.5)
    for _ in range(2):
        clock.stall(wait(0.25))
    found = clock.read(10, 10)
    assert found["images_per_second"] == pytest.approx(20), "a pause counts once"
    assert found["stall_ms"] == 50, "per step"
    wait(1)
    assert clock.read(10, 0)["stall_ms"] == 0


@pytest.mark.parametrize(
    "device, peak", [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-40GB", 312e12)]
)
def test_the_clock_knows_the_utilisation_of_known_devices(wait, device, peak):
    """100 steps of 256 images in 10 s on four of them."""
    clock = Clock(256, train_flops=770.5e9, device_name=device, world_size=4)
    wait(10)
    assert clock.read(100, 0)["mfu"] == pytest.approx(2560 * 770.5e9 / (4 * peak))


def test_the_summary_is_one_line_of_what_people_watch_and_is_known():
    text = summary(reading(mfu=0.4567, peak_memory_gib=3.14159, skipped=2, stall_ms=50.0))
    parts = ["loss 1.5000", "denoise 1.7500", "align/digits-vit -0.2500", "norm 1.2500"]
    parts += ["1234 images/s", "MFU 45.7 %", "3.1 GiB", "stall 50.0 ms", "skipped 2", "ETA 1:02:05"]
    assert text.split("  ") == parts
    text = summary(reading(loss=None, denoise=None, stall_ms=0.9))
    assert text.startswith("loss -  denoise -  ")
    assert not any(word in text for word in ("MFU", "GiB", "stall", "skipped", "None"))
