"""What a run writes for people: metrics.jsonl, TensorBoard, the plot, rates and sample grids."""

import json

import numpy as np
import pytest

from repa_fast.train import report
from repa_fast.train.report import (
    Clock,
    Reporter,
    TensorBoard,
    keep_until,
    plot_losses,
    read_metrics,
    summary,
)


def reading(step: int = 1, **changes) -> dict:
    values = {
        "loss": 0.5 + 1 / step,
        "denoise": 0.75 + 1 / step,
        "grad_norm": 1.25,
        "align/digits-vit": -0.25,
        "loss_by_t": [0.1 * i for i in range(9)] + [None],
        "skipped": 0,
        "images_per_second": 1234.4,
        "mfu": None,
        "eta_seconds": 3725.0,
    }
    return {**values, **changes}


def write_lines(path, steps, end: str = "") -> None:
    path.write_text("".join(json.dumps({"step": s, "x": s * 2}) + "\n" for s in steps) + end)


def steps_of(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("step, kept", [(0, []), (25, [10, 20]), (30, [10, 20, 30]), (99, None)])
def test_lines_after_the_step_are_cut(tmp_path, step, kept):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [10, 20, 30, 40])
    keep_until(path, step)
    assert steps_of(path) == ([10, 20, 30, 40] if kept is None else kept)
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize("half", ['{"st', '{"step": 40, "x": 8', "{", '{"step": 40, "x": 8\n'])
def test_a_half_written_last_line_is_cut(tmp_path, half):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [10, 20, 30], half)
    keep_until(path, 99)
    assert path.read_text().endswith("\n")
    assert read_metrics(path) == [{"step": s, "x": 2 * s} for s in (10, 20, 30)]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [10], '{"step": 20, "x": 40}')
    keep_until(path, 99)
    assert path.read_text().endswith("\n") and steps_of(path) == [10, 20]


def test_no_file_is_nothing_to_cut(tmp_path):
    keep_until(tmp_path / "metrics.jsonl", 5)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_line_in_the_middle_is_an_error_with_file_and_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    for function in (read_metrics, lambda p: keep_until(p, 9)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
            function(path)
    assert path.read_text() == '{"step": 1}\n{"step"\n{"step": 3}\n'


def test_a_resumed_file_reads_as_if_the_run_had_not_been_cut_off(tmp_path, capsys):
    def record(start, steps):
        reporter = Reporter(tmp_path, 40, start, None)
        for step in steps:
            reporter.metrics(step, reading(step))
        reporter.close()

    record(0, [10, 20, 30])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "lo')
    record(20, [30, 40])
    expected = [{"step": step, **reading(step)} for step in (10, 20, 30, 40)]
    assert read_metrics(tmp_path / "metrics.jsonl") == expected
    assert capsys.readouterr().out.count("step 30/40") == 2


def test_lines_go_to_the_terminal_and_the_log(tmp_path, capsys):
    reporter = Reporter(tmp_path, 40, 0, None)
    reporter.line("device: a small one")
    reporter.metrics(10, reading())
    reporter.close()
    out, log = capsys.readouterr().out, (tmp_path / "log.txt").read_text()
    for text in ("device: a small one", f"step 10/40  {summary(reading())}"):
        assert text in out and text in log


def test_scalars_can_be_read_back_from_tensorboard(tmp_path, capsys):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reporter = Reporter(tmp_path, 40, 0, TensorBoard(tmp_path / "logs", 0))
    reporter.metrics(10, reading(10))
    reporter.metrics(20, reading(20, denoise=None))
    reporter.image("samples", 20, np.full((8, 8, 3), 200, np.uint8))
    reporter.close()
    events = accumulator.EventAccumulator(str(tmp_path / "logs")).Reload()
    loss = [(event.step, event.value) for event in events.Scalars("loss")]
    assert loss == [(10, pytest.approx(0.6)), (20, pytest.approx(0.55))]
    assert [event.step for event in events.Scalars("denoise")] == [10]
    tags = events.Tags()["scalars"]
    assert {"align/digits-vit", "grad_norm", "loss_by_t/0.0", "loss_by_t/0.8"} <= set(tags)
    assert "loss_by_t/0.9" not in tags and "mfu" not in tags
    assert events.Scalars("loss_by_t/0.3")[0].value == pytest.approx(0.3)
    assert [event.step for event in events.Images("samples")] == [20]


def test_a_resumed_run_purges_the_scalars_after_its_step(tmp_path, capsys):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, steps, loss in ((0, [10, 20, 30], 1.0), (20, [30, 40], 2.0)):
        reporter = Reporter(tmp_path, 40, start, TensorBoard(tmp_path / "logs", start))
        for step in steps:
            reporter.metrics(step, reading(step, loss=loss))
        reporter.close()
    events = accumulator.EventAccumulator(str(tmp_path / "logs")).Reload()
    got = [(event.step, event.value) for event in events.Scalars("loss")]
    assert got == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]


def plot(folder, name, readings) -> np.ndarray:
    """The plot's pixels, uint8 (H, W, 3)."""
    pytest.importorskip("matplotlib")
    from PIL import Image

    metrics, out = folder / f"{name}.jsonl", folder / f"{name}.png"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in readings))
    plot_losses(metrics, out)
    with Image.open(out) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).copy()


def test_the_plot_shows_the_losses(tmp_path):
    falling = [{"step": s, **reading(s)} for s in range(1, 20)]
    rising = [{"step": s, **reading(20 - s)} for s in range(1, 20)]
    plain = [{k: v for k, v in line.items() if k != "align/digits-vit"} for line in falling]
    picture = plot(tmp_path, "falling", falling)
    assert 0.005 < (picture.min(-1) < 250).mean() < 0.5
    assert not np.array_equal(picture, plot(tmp_path, "rising", rising))
    assert picture.shape[1] > 1.5 * plot(tmp_path, "plain", plain).shape[1]


def test_the_plot_leaves_out_what_was_not_measured(tmp_path):
    readings = [{"step": s, **reading(s)} for s in range(1, 9)]
    skipped = {"step": 9, **reading(9, loss=None, denoise=None), "align/digits-vit": None}
    whole = plot(tmp_path, "whole", readings)
    assert np.array_equal(plot(tmp_path, "skipped", [*readings, skipped]), whole)
    plot(tmp_path, "none", [skipped])


class FakeTime:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(report.time, "perf_counter", lambda: self.now)


def test_the_clock_gives_rates_since_the_last_reading(monkeypatch):
    time = FakeTime(monkeypatch)
    clock = Clock(images_per_step=8, train_flops=1e9, device_name="a laptop", world_size=1)
    time.now += 4
    assert clock.read(10, 30) == {"mfu": None, "stall_ms": 0} | {
        "images_per_second": 20.0,
        "eta_seconds": 12.0,
    }
    time.now += 1
    assert clock.read(10, 20) == {"mfu": None, "stall_ms": 0} | {
        "images_per_second": 80.0,
        "eta_seconds": 2.0,
    }


def test_the_clock_takes_pauses_out(monkeypatch):
    time = FakeTime(monkeypatch)
    clock = Clock(images_per_step=8, train_flops=1e9, device_name="a laptop", world_size=1)
    for _ in range(2):
        time.now += 2
        since = time.now
        time.now += 50
        clock.pause(since)
    assert clock.read(10, 10)["images_per_second"] == pytest.approx(20)
    time.now += 4
    assert clock.read(10, 10)["images_per_second"] == pytest.approx(20), "a pause counts once"


def test_the_clock_knows_the_utilisation_of_known_devices(monkeypatch):
    time = FakeTime(monkeypatch)
    clock = Clock(
        images_per_step=256, train_flops=770.5e9, device_name="NVIDIA H100 80GB", world_size=4
    )
    time.now += 10
    # 100 steps of 256 images in 10 s on four devices of 989 TFLOP/s
    assert clock.read(100, 0)["mfu"] == pytest.approx(2560 * 770.5e9 / (4 * 989e12))


def test_the_summary_is_one_line_of_what_people_watch():
    text = summary(reading(mfu=0.4567, peak_memory_gib=3.14159, skipped=2))
    assert "\n" not in text
    for part in (
        "loss 1.5000",
        "denoise 1.7500",
        "align/digits-vit -0.2500",
        "norm 1.2500",
        "1234 images/s",
        "MFU 45.7 %",
        "3.1 GiB",
        "skipped 2",
        "ETA 1:02:05",
    ):
        assert part in text


def test_the_summary_leaves_out_what_is_not_known():
    text = summary(reading(loss=None, denoise=None))
    assert "loss -" in text and "denoise -" in text
    assert not any(word in text for word in ("MFU", "GiB", "skipped", "None"))


def test_waiting_for_data_is_counted_per_step_and_said_when_it_matters(monkeypatch):
    time = FakeTime(monkeypatch)
    clock = Clock(images_per_step=8, train_flops=1e9, device_name="a laptop", world_size=1)
    for _ in range(2):
        since = time.now
        time.now += 0.25
        clock.stall(since)
    assert clock.read(10, 0)["stall_ms"] == 50
    time.now += 1
    assert clock.read(10, 0)["stall_ms"] == 0
    assert "stall 50.0 ms" in summary(reading(stall_ms=50.0))
    assert "stall" not in summary(reading(stall_ms=0.9))
