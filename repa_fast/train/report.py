"""What people see of a run: a progress bar or plain lines, metrics.jsonl, TensorBoard."""

import json
import re
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from repa_fast.configs.run import RunConfig
from repa_fast.eval.pictures import save_png
from repa_fast.failure import Failure
from repa_fast.models.flops import peak_flops
from repa_fast.train.outputs import SAID_EVERY, Attempts, Lines
from repa_fast.whole import parse_json, read_regular, write_whole
from repa_fast.words import one_line, rate


class TensorBoard:
    """Event files in `folder`: numbers, and uint8 (H, W, 3) pictures, by step.

    A writer whose disk was full stays broken, so that a new one, of a new file, takes its place a
    minute later.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        self._folder, self._again = str(folder), 0.0
        self._writer: Any = self._open(purge_step=start_step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        def write() -> None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

        self._attempt(write)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._attempt(lambda: self._writer.add_image(name, pixels, step, dataformats="HWC"))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self, **options: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._folder, **options)

    def _attempt(self, write: Callable[[], None]) -> None:
        if self._writer is None and time.monotonic() < self._again:
            return
        try:
            self._writer = self._writer or self._open()
            write()
        except OSError:
            self._writer, self._again = None, time.monotonic() + SAID_EVERY
            raise


class WeightsAndBiases:
    """A run of the project REPA, its id kept in the run's folder for when it is resumed.

    WANDB_MODE=offline keeps everything in that folder. ValueError if wandb is not installed.
    """

    def __init__(self, config: RunConfig, run: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "report_to is wandb, but the package is not installed: pip install "
                "'repa-fast[wandb]'"
            ) from error
        stored = run / "wandb-id"
        if not stored.exists():
            write_whole(stored, secrets.token_hex(4))
        known = read_regular(stored).decode(errors="replace")
        if not re.fullmatch(r"[\w-]{1,64}", known):
            raise ValueError(f"{stored} holds {known!r:.80}, expected an id of a run: remove it")
        self._image = wandb.Image
        options = {"project": "REPA", "name": config.exp_name, "config": config.to_dict()}
        try:
            self._run = wandb.init(id=known, resume="allow", dir=run, **options)
        except Exception as error:  # of wandb, whose kinds are many
            raise Failure(f"report_to is wandb: {one_line(error)}") from error

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._run.log({name: self._image(pixels)}, step=step)

    def close(self) -> None:
        self._run.finish()


Tracker = TensorBoard | WeightsAndBiases


def open_tracker(config: RunConfig, run: Path, start_step: int) -> Tracker | None:
    """Open the tracker `--report-to` names; what it holds after `start_step` is superseded."""
    if config.report_to == "tensorboard":
        return TensorBoard(run / config.logging_dir, start_step)
    return WeightsAndBiases(config, run) if config.report_to == "wandb" else None


class Mute:
    """The reporter of a process that has nothing to say, or the tracker of a run without one."""

    def __getattr__(self, _: str):
        return lambda *_, **__: None


class Reporter:
    """Writes the first process's metrics into the run's folder; the others have no reporter.

    Lines of metrics.jsonl after `start_step` belong to a run that was cut off; they are dropped, so
    that the file reads as if it had not been. A tracker also gets every metric and picture.
    """

    def __init__(
        self, folder: Path, total_steps: int, start_step: int, tracker: Tracker | None
    ) -> None:
        self._folder = folder
        self._files = {name: folder / f"{name}.jsonl" for name in ("metrics", "evals")}
        for path in self._files.values():
            keep_until(path, start_step)
        self._metrics = Lines(self._files["metrics"])
        self._evals: Lines | None = None
        self._log = Lines(folder / "log.txt")
        self._tracker = tracker or Mute()
        self._bar = _bar(total_steps, start_step) if sys.stdout.isatty() else None
        self._total_steps = total_steps
        self.attempts = Attempts()

    def advance(self, step: int, **fields: str) -> None:
        """Move the bar to `step`."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, **fields)

    def metrics(self, step: int, values: dict) -> None:
        """Record one reading of the metrics."""
        with self.attempts.to_write("metrics.jsonl"):
            self._metrics.add(json.dumps({"step": step, **values}))
        with self.attempts.to_write("what the tracker takes"):
            self._tracker.scalars(step, scalars(values))
        self.advance(step, text=short_summary(values))
        self.line(f"step {step}/{self._total_steps}  {summary(values)}")

    def scores(self, step: int, values: dict[str, float], failure: str = "") -> None:
        """Record an evaluation in evals.jsonl: its scores, or why it failed."""
        with self.attempts.to_write("evals.jsonl"):
            self._evals = self._evals or Lines(self._files["evals"])
            self._evals.add(json.dumps({"step": step, **(values or {"failed": failure})}))
        with self.attempts.to_write("what the tracker takes"):
            self._tracker.scalars(step, {f"eval/{name}": v for name, v in values.items()})
        listed = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if failure:
            self.line(f"warning: no evaluation at step {step}: {failure}")
        else:
            self.line(f"evaluation at step {step}  {listed}")

    def flush(self) -> None:
        """Write the metrics that a full disk refused before."""
        with self.attempts.to_write("metrics.jsonl"):
            self._metrics.flush()

    def line(self, text: str) -> None:
        """Write a line to log.txt and the terminal, there above the bar."""
        with self.attempts.to_write("log.txt"):
            self._log.add(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}")
        self.flush()
        with self.attempts.to_write("a line on the terminal"):
            if self._bar is None:
                print(text, flush=True)
            else:
                self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def image(self, name: str, step: int, pixels: np.ndarray) -> None:
        """Write a uint8 (H, W, 3) picture to NAME/STEP.png and give it to the tracker."""
        file = self._folder / name / f"{step:07d}.png"
        with self.attempts.to_write(file):
            save_png(pixels, file)
        with self.attempts.to_write("what the tracker takes"):
            self._tracker.image(step, name, pixels)

    def close(self) -> None:
        """Close the bar and all files."""
        if self._bar is not None:
            self._bar.stop()
        for output in (self._tracker, self._metrics, self._evals or Mute(), self._log):
            with self.attempts.to_write("the end of the log, or of metrics"):
                output.close()


def scalars(values: dict) -> dict[str, float]:
    """Return the numbers of a reading by name, the loss of each t-bin under its lower edge."""
    by_t = {f"loss_by_t/{index / 10:.1f}": v for index, v in enumerate(values["loss_by_t"])}
    return {n: value for n, value in (values | by_t).items() if isinstance(value, (int, float))}


def summary(values: dict) -> str:
    """Return one line of the metrics people watch."""
    shown = ["loss", "denoise", *(name for name in values if name.startswith("align/"))]
    parts = [f"{name} {_number(values[name])}" for name in shown]
    parts += [f"norm {_number(values['grad_norm'])}", rate(values["images_per_second"])]
    if values.get("mfu") is not None:
        parts.append(f"MFU {100 * values['mfu']:.1f} %")
    if values.get("peak_memory_gib") is not None:
        parts.append(f"{values['peak_memory_gib']:.1f} GiB")
    if values.get("stall_ms", 0) >= 1:
        parts.append(f"stall {values['stall_ms']:.1f} ms")
    if values["skipped"]:
        parts.append(f"skipped {values['skipped']}")
    return "  ".join([*parts, f"ETA {_duration(values['eta_seconds'])}"])


def short_summary(values: dict) -> str:
    """Return what fits beside a progress bar: loss, mean alignment, rate, ETA."""
    aligned = [value for name, value in values.items() if name.startswith("align/")]
    known = aligned and None not in aligned
    align = f" align {sum(aligned) / len(aligned):.3f}" if known else ""
    speed, eta = rate(values["images_per_second"]), _duration(values["eta_seconds"])
    return f"loss {_number(values['loss'])}{align} {speed} {eta}"


@dataclass
class Clock:
    """Training time and rate, with pauses (checkpoints, sample grids) taken out."""

    images_per_step: int
    train_flops: float
    device_name: str
    world_size: int

    def __post_init__(self) -> None:
        self._since = time.perf_counter()
        self._paused = self._stalled = 0.0

    def stall(self, since: float) -> None:
        """Count the time from `since` (perf_counter seconds) until now as waiting for data."""
        self._stalled += time.perf_counter() - since

    def pause(self, since: float) -> None:
        """Take the time from `since` (perf_counter seconds) until now out."""
        self._paused += time.perf_counter() - since

    def read(self, steps: int, remaining: int) -> dict[str, float | None]:
        """Return rates over `steps` steps since the last reading; reset."""
        now, counted = time.perf_counter(), max(steps, 1)
        seconds = max(now - self._since - self._paused, 1e-9)
        stalled = 1e3 * self._stalled / counted
        self._since, self._paused, self._stalled = now, 0.0, 0.0
        speed, peak = steps * self.images_per_step / seconds, peak_flops(self.device_name)
        return {
            "images_per_second": speed,
            "mfu": None if peak is None else speed * self.train_flops / (peak * self.world_size),
            "stall_ms": stalled,
            "eta_seconds": seconds / counted * remaining,
        }


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of a metrics file that lie after `step`, and a half-written last line."""
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))


def read_metrics(path: Path) -> list[dict]:
    """Read a metrics file; leave out a last line cut off by a crash.

    ValueError for another line that is no JSON object with the number of a step.
    """
    lines, readings = read_regular(path).splitlines(), []
    for number, line in enumerate(lines, start=1):
        try:
            reading = parse_json(line, "it")
            if not isinstance(reading, dict) or type(reading.get("step")) is not int:
                raise ValueError(f"{line[:40]!r}, expected values by name, a step among them")
            readings.append(reading)
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: {error}; remove the line") from error
    return readings


def _bar(total_steps: int, start_step: int):
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    bar = Progress(BarColumn(bar_width=16), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    bar.add_task("train", total=total_steps, completed=start_step, text="")
    bar.start()
    return bar


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
