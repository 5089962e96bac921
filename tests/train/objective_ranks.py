"""A few steps of every objective on the same images, in one process or shared out among several."""

import os

import torch

from repa_fast.data.digits import digits_metadata
from repa_fast.distributed import World, session
from repa_fast.train.state import TrainState, build_state
from repa_fast.train.step import synthetic_batch, train_step
from tests.train.conftest import randomise, tiny_config

STEPS = 4
UNTIL = 2
SRA = {"align": "sra", "block_out_s": 1, "block_out_t": 3}
DDPM = {"objective": "ddpm"}
RELEASED = {"loss_type": "sml1", "align_decay": "sra"}
NT_XENT = {"loss_type": "nt-xent", "nt_xent_negatives": "global"}
OBJECTIVES = {
    "vanilla": {"enc_type": "none"},
    "noise": {"enc_type": "none", "prediction": "noise"},
    "score-vp": {"prediction": "score", "path_type": "VP", "loss_weight": "likelihood"},
    "repa": {},
    "nt-xent": NT_XENT,
    "conv": {"projector": "conv", "spatial_norm": True},
    "sra": SRA,
    "dit": DDPM | {"enc_type": "none"},
    "dit-repa": DDPM,
    "dit-sra": DDPM | SRA | RELEASED,
    "until": {"align_until": UNTIL},
    "nt-xent-until": NT_XENT | {"align_until": UNTIL},
    "sra-until": SRA | {"align_until": UNTIL},
}
WHOLE_BATCH = ("nt-xent", "nt-xent-until", "nt-xent-batch")
"""Micro-batches change the pool of negatives; so do processes, unless it is of all of them."""


def steps(
    world: World, name: str, overrides: dict, *, compiled: bool = False
) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Metrics of each step, and the weights and their average in the end.

    Every process has two micro-batches where those change nothing, and one alone has one.
    """
    config = tiny_config(**overrides, compile=compiled)
    state = build_state(config, digits_metadata(), world)
    randomise(state)
    state.micro_batch = state.local_batch
    if world.size > 1 and name not in WHOLE_BATCH:
        state.micro_batch //= 2
    first = world.rank * state.local_batch
    readings = []
    for step in range(STEPS):
        if step and step == config.align_until:
            state.end_alignment()
        torch.manual_seed(step)
        images, _ = synthetic_batch(state, config.images_per_step)
        mine = {key: value[first : first + state.local_batch] for key, value in images.items()}
        train_step(state, mine)
        readings.append(state.metrics.read(world))
    return readings, all_weights(state)


def start(world: World, overrides: dict) -> dict[str, torch.Tensor]:
    """The weights and their average before the first step, as `steps` names them."""
    state = build_state(tiny_config(**overrides), digits_metadata(), world)
    randomise(state)
    return all_weights(state)


def all_weights(state: TrainState) -> dict[str, torch.Tensor]:
    averages = {f"ema.{key}": value for key, value in state.ema.state_dict().items()}
    return averages | state.model.state_dict()


def main() -> None:
    """Under torchrun: every process saves what it found for all objectives."""
    torch.set_num_threads(1)
    batch = NT_XENT | {"nt_xent_negatives": "batch"}
    with session() as world:
        found = {
            name: steps(world, name, overrides)
            for name, overrides in (OBJECTIVES | {"nt-xent-batch": batch}).items()
        }
        torch.save(found, f"{os.environ['OUT']}.{world.rank}")


if __name__ == "__main__":
    main()
