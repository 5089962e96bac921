"""Native checkpoints: a directory written through torch.distributed.checkpoint, beside training.

Every process writes what it has: its shards of sharded tensors, and a share of those that all have
alike. They are read back by any number of processes, sharded or not, under the official names.
Tensors alone lie in torch's files; counters and settings lie beside them as JSON.
"""

import gc
import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from repa_fast.checkpoint import formats, reader
from repa_fast.checkpoint.index import read_index
from repa_fast.checkpoint.layout import CONFIG, COUNTERS, DATASET, path_of, read_settings, steps
from repa_fast.checkpoint.marker import damage, is_complete
from repa_fast.checkpoint.writer import Writer
from repa_fast.configs.build import sizes
from repa_fast.configs.config import TrainConfig
from repa_fast.data.dataset import Metadata
from repa_fast.distributed import World
from repa_fast.encoders.files import differences
from repa_fast.failure import Failure
from repa_fast.lock import Lock
from repa_fast.train.spikes import History
from repa_fast.train.state import TrainState


class CheckpointFailed(Failure):
    """A checkpoint that had to be written was not, or two in a row were not."""


@dataclass
class Save:
    """A save in flight: perf_counter seconds, `ended` 0 until it has, `paused` training so long."""

    writer: Writer
    stager: DefaultStager
    done: Future
    begun: float
    paused: float
    ended: float = 0.0

    def end(self, _: Future) -> None:
        self.ended = time.perf_counter()


class Checkpointer:
    """Writes a run's checkpoints; every process has one and calls `save` and `settle` alike.

    A save copies this process's part of the tensors into host memory and returns; from there a
    thread writes it while training goes on, one save at a time. On the first process `announce`
    takes a line when it is complete, on the disks of all processes.

    A save that fails (a full disk, a folder that is read-only) does not stop training: what it
    wrote is removed and a warning says why. If the next one fails too, the one after that is waited
    for, and CheckpointFailed stops the run if it fails as well; at once where a checkpoint is
    waited for anyway, which is at the end, on a signal, and when training has diverged.
    """

    def __init__(self, folder: Path, world: World, lock: Lock | None = None) -> None:
        self.folder = folder
        self.world = world
        self._lock = lock
        self.announce: Callable[[str], None] = lambda line: None
        self._group = None
        if world.size > 1:  # beside the steps' collectives, a thread's need a group of their own
            self._group = dist.new_group(backend="gloo", timeout=world.timeout)
        self._save: Save | None = None
        self._failures: list[str] = []  # in a row
        self._first = True
        reader.expect_no_warnings()

    @property
    def failing(self) -> bool:
        """Whether the last two saves that ended failed, as far as this process knows."""
        return len(self._failures) > 1

    def save(self, state: TrainState, *, wait: bool = False) -> Path:
        """Begin to write the checkpoint of the current step; return its directory.

        A whole checkpoint of this step is left as it is; a damaged one is moved aside.

        Raises:
            CheckpointFailed: it failed, with `wait` or after two others that did.
            LockLost: another launch has taken the run over.
        """
        called = time.perf_counter()
        self.settle()
        gc.collect()  # DCP's plans of earlier saves are cycles, which Python leaves for long
        if self._first:
            gc.freeze()  # what the first save finds was imported or built: others pass over it
            self._first = False
        wait = wait or self.failing
        begun = time.perf_counter()
        target = path_of(self.folder, state.step)
        if self.world.on_first(lambda: self._look_at(target)):
            self.announce(f"checkpoint {target} is there already")
            return target
        config = state.config
        settings = {
            COUNTERS: _counters(state),
            CONFIG: config.to_dict(),
            DATASET: asdict(state.metadata),
        }
        texts = {name: json.dumps(values, indent=2) for name, values in settings.items()}
        writer = Writer(target, texts, config.keep_last, config.keep_every, self._lock)
        stager = DefaultStager(StagingOptions(False, False, False, False))
        done = dcp.async_save(
            share(tensors(state), self.world),
            storage_writer=writer,
            process_group=self._group,
            async_stager=stager,
            no_dist=self.world.size == 1,
        )
        self._save = Save(writer, stager, done, begun, time.perf_counter() - called)
        done.add_done_callback(self._save.end)
        if wait:
            done.exception()
            self._save.paused = time.perf_counter() - called
            self.settle()
            if self._failures:
                raise CheckpointFailed(self._failures[-1])
        return target

    def _look_at(self, target: Path) -> bool:
        """Return whether `target` is a whole checkpoint; LockLost as for `save`."""
        if self._lock is not None:
            self._lock.expect()
        try:
            return is_complete(target) and not damage(target)
        except OSError:  # unreadable
            return False

    def poll(self) -> None:
        """Announce the save in flight if it has ended; never waits."""
        if self._save is not None and self._save.done.done():
            self.settle()

    def close(self) -> None:
        """Wait for the save in flight, also when training ends in an error."""
        self.settle()
        gc.unfreeze()  # what is never collected, extensions report as leaked at exit
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def settle(self) -> None:
        """Wait for the save in flight, and announce it or say why it failed."""
        if self._save is None:
            return
        save, self._save = self._save, None
        error = save.done.exception()
        save.stager.close()
        save.writer.close()
        target = save.writer.path
        if error is None:
            self._failures = []
            seconds = (save.ended or time.perf_counter()) - save.begun
            self.announce(
                f"checkpoint {target} paused the run {1e3 * save.paused:.0f} ms, "
                f"written in {seconds:.1f} s"
            )
        else:
            newest = steps(self.folder)[-1:]
            self._failures.append(
                f"checkpoint {target} was not written: {reader.reasons(error)} (the newest "
                f"whole one is {path_of(self.folder, *newest).name if newest else 'none'})"
            )
            self.announce(f"WARNING: {self._failures[-1]}; a third failure in a row ends the run")


def save(folder: Path, state: TrainState) -> Path:
    """Write the checkpoint of the current step and wait for it; all processes call it."""
    with closing(Checkpointer(folder, state.world)) as checkpointer:
        return checkpointer.save(state, wait=True)


def share(tensors: dict[str, torch.Tensor], world: World) -> dict[str, dict[str, torch.Tensor]]:
    """Return what this process writes, by the first part of its name, on which torch logs a line.

    That is all its shards, and its share of what all processes have alike.
    """
    writers, loads = {}, [0] * world.size
    alike = {name: t.nbytes for name, t in tensors.items() if not isinstance(t, DTensor)}
    for name in sorted(alike, key=alike.get, reverse=True):
        writers[name] = loads.index(min(loads))
        loads[writers[name]] += alike[name]
    mine: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if writers.get(name, world.rank) == world.rank:
            part, _, rest = name.partition(".")
            mine.setdefault(part, {})[rest] = tensor
    return mine


def load(source: Path, state: TrainState) -> None:
    """Read a checkpoint directory into `state`, in place; hyperparameters stay the config's.

    ValueError if it is not complete or damaged, or is of another model (lists what differs),
    another task or another dataset's latents.
    """
    _expect_same_model(source, state)
    stored = read_settings(source)
    rows = stored.counters.get("rows") or state.rows  # earlier versions did not count them
    theirs = fixed(stored.config, stored.metadata, rows)
    ours = fixed(state.config, state.metadata, state.rows or rows)
    problems = [f"{n} {was!r}, expected {ours[n]!r}" for n, was in theirs.items() if was != ours[n]]
    if problems:
        raise ValueError(
            f"{source} is of a run with {'; '.join(problems)}: it cannot be gone on from; leave "
            "such flags out, or start a new run from its weights with --init-from"
        )
    reader.load(tensors(state), source, no_dist=state.world.size == 1)
    state.optimizer.write_leaves()
    try:
        _take_counters(stored.counters, state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{source / COUNTERS} is not what a run counts: {error!r}") from error


def fixed(config: TrainConfig, metadata: Metadata, rows: int) -> dict:
    """Return what a run cannot change.

    With another value the tensors would fit, and mean something else, or the order of the data and
    the noise would be another from here on.
    """
    names = ("objective", "prediction", "path_type", "align", "enc_type", "seed", "images_per_step")
    latents = ("latent_shape", "vae", "scale", "bias")
    return {
        **sizes(config),
        **{name: getattr(config, name) for name in names},
        **{name: getattr(metadata, name) for name in latents},
        "dataset rows": rows,
    }


def _take_counters(counters: dict, state: TrainState) -> None:
    if state.scaler.is_enabled() and counters["scaler"]:
        state.scaler.load_state_dict(counters["scaler"])
    state.metrics.load_state(counters["metrics"], state.world)
    history = counters.get("history", {})
    history.pop("rollbacks", None)  # of earlier versions, which went back by themselves
    state.history = History(**history)
    if counters["world_size"] == state.world.size:
        state.micro_batch = counters["micro_batch"]
    state.step = counters["step"]


def tensors(state: TrainState) -> dict[str, torch.Tensor]:
    """Return all of a run's tensors by the name they are stored under; not copies."""
    state.optimizer.begin_states()
    modules = {"model": state.model, "ema": state.ema}
    modules |= {f"ema_{n}": average for n, average in enumerate(state.more_emas, start=2)}
    found = {
        f"{prefix}.{name}": tensor
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    for name, parameter in state.model.state_dict(keep_vars=True).items():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            found[f"optimizer.state.{name}.{key}"] = value
    return found


def _counters(state: TrainState) -> dict:
    """Return plain numbers; sample order and noise need no more than the step and the skip."""
    return {
        "step": state.step,
        "rows": state.rows,
        "world_size": state.world.size,
        "micro_batch": state.micro_batch,
        "scaler": state.scaler.state_dict(),
        "metrics": state.metrics.state(state.world),
        "history": asdict(state.history),
    }


def _expect_same_model(source: Path, state: TrainState) -> None:
    entries = read_index(source).state_dict_metadata
    averages = len({name.split(".")[0] for name in entries if name.startswith("ema")})
    expected = len(state.config.ema_decays)
    if averages != expected:
        raise ValueError(
            f"{source} holds {averages} EMAs of the weights, expected {expected} "
            f"(--ema-decay {state.config.ema_decay})"
        )
    ours = state.model.state_dict()
    stored = {
        name.removeprefix("model."): torch.empty(entry.size, device="meta")
        for name, entry in entries.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    problems = differences(stored, ours)
    if problems:
        raise ValueError(
            f"{source} holds a {formats.shape_of(stored)}, the run's model is a "
            f"{formats.shape_of(ours)}: {'; '.join(problems)}"
        )
