"""Under torchrun: a step whose batch holds a NaN on the last process alone."""

import os

import torch

from repa_fast.data.digits import digits_metadata
from repa_fast.distributed import session
from repa_fast.train.state import TrainState, build_state
from repa_fast.train.step import synthetic_batch, train_step
from tests.train.conftest import randomise, tiny_config

SRA = {"align": "sra", "block_out_s": 1, "block_out_t": 3}


def tensors(state: TrainState) -> dict[str, torch.Tensor]:
    """Parameters, average and optimizer state, copied."""
    found = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    found |= {f"ema.{name}": tensor for name, tensor in state.ema.state_dict().items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def main() -> None:
    """A good step, the bad one, and a good one again; every process saves what it found."""
    torch.set_num_threads(1)
    with session() as world:
        state = build_state(tiny_config(**SRA), digits_metadata(), world)
        randomise(state)
        state.micro_batch = state.local_batch
        torch.manual_seed(world.rank)
        good, _ = synthetic_batch(state, state.local_batch)
        bad = {**good, "moments": good["moments"].clone()}
        if world.rank == world.size - 1:
            bad["moments"][0, 0, 0, 0] = float("nan")
        found = {"readings": [], "tensors": []}
        for batch in (good, bad, good):
            train_step(state, batch)
            found["tensors"].append(tensors(state))
            found["readings"].append(state.metrics.read(world))
        found["step"], found["bad_run"] = state.step, int(state.metrics.bad_run)
        torch.save(found, f"{os.environ['OUT']}.{world.rank}")


if __name__ == "__main__":
    main()
