"""A tiny run saved and loaded by 1 to 4 processes, under DDP, FSDP and HSDP."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from repa_fast.checkpoint import writer
from repa_fast.data.digits import digits_metadata
from repa_fast.distributed import World
from repa_fast.train import checkpoint
from repa_fast.train.optim import build_optimizer
from repa_fast.train.state import TrainState, build_state
from repa_fast.train.step import synthetic_batch, train_step
from tests.train.conftest import randomise, tiny_config

SAVED = 2
SAVES = {"fsdp": 2, "ddp": 2}
"""The directories written at step SAVED by a run from its start, and by how many processes."""
LOADS = {  # by: (from, processes); each is saved again
    "fsdp on 3": ("fsdp", 3),
    "fsdp on 3, was ddp": ("ddp", 3),
    "hsdp on 4": ("fsdp", 4),
    "ddp on 2, was fsdp": ("fsdp", 2),
}
FAILING = 2


def build(world: World, kind: str, **overrides) -> TrainState:
    """A state without encoders whose model and average are sharded, unless `kind` is ddp."""
    alone = World(0, 1, world.device)
    sharded = kind in ("fsdp", "hsdp")
    config = tiny_config(enc_type="none", **overrides)
    state = build_state(config, digits_metadata(), alone if sharded else world)
    randomise(state)
    if sharded:
        shape = (world.size,) if kind == "fsdp" else (2, world.size // 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for module in (state.model, state.ema):
            fully_shard(module, mesh=mesh)
        state.world = world
        state.wrapped = state.model
        state.optimizer = build_optimizer(state.model, [state.ema], config, {})
    state.micro_batch = state.local_batch
    return state


def step(state: TrainState) -> None:
    """One on this process's share of images that depend on the step alone."""
    torch.manual_seed(state.step)
    images, _ = synthetic_batch(state, state.config.images_per_step)
    first = state.world.rank * state.local_batch
    train_step(state, {k: v[first : first + state.local_batch] for k, v in images.items()})


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    """Whole tensors by the names they are stored under, copied."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in checkpoint.tensors(state).items()
    }


def save_while_training(world: World, kind: str, folder: Path) -> dict:
    """Train to SAVED, begin to save, and train on beside it."""
    state = build(world, kind)
    while state.step < SAVED:
        step(state)
    found = {"saved": everything(state)}
    lines = []
    saves = checkpoint.Checkpointer(folder, world)
    saves.announce = lines.append
    saves.save(state)
    step(state)
    saves.settle()
    saves.close()
    return found | {"next": everything(state), "lines": lines}


def load_and_go_on(world: World, kind: str, source: Path, folder: Path) -> dict:
    """Load, save again under another name, and train one step."""
    state = build(world, kind, seed=5)
    state.config.seed = 0
    checkpoint.load(checkpoint.path_of(source, SAVED), state)
    found = {"saved": everything(state)}
    checkpoint.save(folder, state)
    step(state)
    return found | {"next": everything(state)}


def fail(world: World, folder: Path) -> dict:
    """The disk of the second process is full from the second save on: what is said and raised."""
    state = build(world, "fsdp")
    lines, raised = [], []
    saves = checkpoint.Checkpointer(folder, world)
    saves.announce = lines.append
    saves.save(state)
    saves.settle()

    def full(files: list[Path]) -> dict:
        raise OSError(28, "No space left on device", str(files[0]))

    seal = writer.seal
    if world.rank == 1:
        writer.seal = full
    for number in (1, 2, 3):
        state.step = number
        try:
            saves.save(state)
            saves.settle()
        except checkpoint.CheckpointFailed as error:
            raised.append(f"{number}: {error}")
    saves.close()
    writer.seal = seal
    return {"lines": lines, "raised": raised}


def main() -> None:
    """Under torchrun with 4 processes, of which the first so many do each job in turn."""
    torch.set_num_threads(1)
    out, rank = Path(os.environ["OUT"]), int(os.environ["RANK"])
    jobs = [
        (name, size, lambda w, n=name: save_while_training(w, n, out / n))
        for name, size in SAVES.items()
    ]
    jobs += [
        (name, size, lambda w, n=name, s=source: load_and_go_on(w, n[:4].strip(), out / s, out / n))
        for name, (source, size) in LOADS.items()
    ]
    jobs.append(("failing", FAILING, lambda w: fail(w, out / "failing")))
    for name, size, job in jobs:
        if rank < size:
            store = f"file://{out / name.replace(' ', '-')}.store"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
            torch.save(job(World(rank, size, torch.device("cpu"))), out / f"{name}.{rank}")
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
