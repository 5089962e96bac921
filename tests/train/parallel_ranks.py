"""Steps of a tiny run under every way to spread it over processes, and what each of them holds."""

import contextlib
import dataclasses
import os
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from repa_fast.checkpoint import export, formats
from repa_fast.configs.config import TrainConfig
from repa_fast.data.digits import digits_metadata
from repa_fast.distributed import World, session
from repa_fast.train import checkpoint, memory, parallel, resume
from repa_fast.train.evaluate import sample_grid
from repa_fast.train.state import TrainState, build_state
from repa_fast.train.step import accumulate, draw_local, synthetic_batch, train_step
from tests.train.conftest import randomise, tiny_config

STEPS = 3
UNTIL = 1
ALONE = World(0, 1, torch.device("cpu"))
WHOLE = {
    "parallel": "ddp",
    "shard_size": 0,
    "reshard_after_forward": False,
    "shard_encoder": False,
    "activation_checkpointing": "none",
    "compile": False,
}
"""What makes one process, eager, of any config here."""
FSDP = {"parallel": "fsdp"}
REPLICATED = {"parallel": "hsdp", "shard_size": 1}
SQUARE = {"parallel": "hsdp", "shard_size": 2}
SRA = {"align": "sra", "block_out_s": 1, "block_out_t": 3}
DIT = {"objective": "ddpm", "enc_type": "none"}
LEAN = {"reshard_after_forward": True, "activation_checkpointing": "full"}
SELECTIVE = {"activation_checkpointing": "selective", "shard_encoder": True}
CASES = {
    "fsdp": FSDP,
    "fsdp selective": FSDP | SELECTIVE | {"ema_decay": "0.9,0.99"},
    "fsdp until": FSDP | {"align_until": UNTIL},
    "fsdp dit sra": FSDP | LEAN | SRA | {"objective": "ddpm", "loss_type": "sml1"},
    "hsdp 2 x 1 sra": REPLICATED | SRA,
}
MORE_CASES = {
    "ddp": {"activation_checkpointing": "selective"},
    "fsdp conv": FSDP | {"projector": "conv", "qk_norm": True},
    "fsdp nt-xent": FSDP | {"loss_type": "nt-xent", "nt_xent_negatives": "global"},
    "fsdp sra until": FSDP | SRA | {"align_until": UNTIL},
    "fsdp sra": FSDP | SRA,
    "fsdp dit": FSDP | DIT,
}
SQUARES = {"hsdp 2 x 2": SQUARE, "hsdp 2 x 2 sra": SQUARE | SRA | LEAN, "fsdp 4": FSDP}
COMPILED = {
    "fsdp": FSDP,
    "fsdp selective": FSDP | SELECTIVE,
    "fsdp full": FSDP | LEAN | {"enc_type": "none"},
    "fsdp full sra": FSDP | SRA | LEAN,
    "hsdp 2 x 1": REPLICATED,
    "ddp selective": {"activation_checkpointing": "selective"},
}
TRACED = "fsdp full"
"""The case of COMPILED that is traced in a test that is not slow."""
WHOLE_BATCH = ("fsdp nt-xent",)
"""Micro-batches change the pool of negatives."""


def build(world: World, config: TrainConfig) -> TrainState:
    """A state whose adaLN and final layers are not at their zero init, the same on any world."""
    state = build_state(config, digits_metadata(), world)
    state.micro_batch = state.local_batch
    start = build_state(
        dataclasses.replace(config, **WHOLE), digits_metadata(), ALONE, encoders_later=True
    )
    randomise(start)
    for own in (state.model, state.ema, *state.more_emas):
        formats.load_exactly(own, start.model.state_dict(), "the start")
    return state


def local_batch(state: TrainState, step: int) -> dict[str, torch.Tensor]:
    """This process's share of the images of a step."""
    torch.manual_seed(step)
    images, _ = synthetic_batch(state, state.config.images_per_step)
    first = state.world.rank * state.local_batch
    return {key: value[first : first + state.local_batch] for key, value in images.items()}


def steps(world: World, name: str, overrides: dict) -> dict:
    """Metrics of each step, final weights and averages, and compilations after each step.

    Every one of several processes has two micro-batches where those change nothing.
    """
    state = build(world, tiny_config(**overrides))
    if world.size > 1 and name not in WHOLE_BATCH:
        state.micro_batch = -(-state.local_batch // 2)
    readings, graphs = [], []
    for step in range(STEPS):
        if step and step == state.config.align_until:
            state.end_alignment()
        train_step(state, local_batch(state, step))
        readings.append(state.metrics.read(world))
        graphs.append(counters["stats"]["unique_graphs"])
    return {"readings": readings, "weights": weights(state), "graphs": graphs}


def weights(state: TrainState) -> dict[str, torch.Tensor]:
    """Whole weights of the model and of every average."""
    models = {"": state.model, "ema.": state.ema}
    models |= {f"ema_{n}.": ema for n, ema in enumerate(state.more_emas, start=2)}
    return {
        f"{prefix}{name}": whole(tensor)
        for prefix, model in models.items()
        for name, tensor in model.state_dict().items()
    }


def moments(state: TrainState) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": whole(value)
        for name, parameter in state.model.named_parameters()
        for key, value in state.optimizer.state.get(parameter, {}).items()
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def first_gradients(world: World, micro_batches: int = 1, **overrides) -> dict[str, torch.Tensor]:
    """Whole gradients of the first step."""
    state = build(world, tiny_config(**overrides))
    state.micro_batch = state.local_batch // micro_batches
    accumulate(state, local_batch(state, 0), draw_local(state))
    return gradients(state.model)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: whole(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def gradients_at_fractional_times(world: World, **overrides) -> dict[str, torch.Tensor]:
    """Of the mean square of a DiT's output at times 0..999 in fp32, which bf16 cannot hold."""
    state = build(world, tiny_config(**DIT, **overrides))
    batch = local_batch(state, 0)
    generator = torch.Generator().manual_seed(2)
    shape = (state.config.images_per_step, *state.metadata.latent_shape)
    first = world.rank * state.local_batch
    mine = slice(first, first + state.local_batch)
    noisy = torch.randn(shape, generator=generator)[mine]
    times = (999 * torch.rand(shape[0], generator=generator))[mine]
    with state.autocast():
        output, _ = state.model(noisy, times, batch["label"])
    output.square().mean().backward()
    return gradients(state.model)


def dtypes_inside(world: World, **overrides) -> dict[str, list]:
    """By module: the dtypes of what it receives, and last that of its weights at that moment."""
    state = build(world, tiny_config(**overrides))
    seen: dict[str, list] = {}

    def note(name: str):
        def hook(module, arguments):
            tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
            weight = next(iter(module.parameters())).dtype
            seen[name] = [str(tensor.dtype) for tensor in tensors] + [str(weight)]

        return hook

    for name in ("t_embedder", "blocks.1", "blocks.1.attn", "blocks.1.mlp.fc2", "final_layer"):
        state.model.get_submodule(name).register_forward_pre_hook(note(name))
    accumulate(state, local_batch(state, 0), draw_local(state))
    stored = {str(p.dtype) for p in state.model.parameters()}
    reduced = {str(p.grad.dtype) for p in state.model.parameters() if p.grad is not None}
    return seen | {"stored": sorted(stored), "gradients": sorted(reduced)}


@contextlib.contextmanager
def casting_inputs():
    """FSDP's own default, which casts what enters a unit."""
    default = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    with mock.patch.object(parallel, "policy", return_value=default):
        yield


def precision(world: World) -> dict:
    half = {"mixed_precision": "bf16"}
    found = {
        "fp32": first_gradients(ALONE),
        "alone": first_gradients(ALONE, **half),
        "fsdp": first_gradients(world, **half, **FSDP),
        "fsdp micro-batches": first_gradients(world, 3, **half, **FSDP),
        "fsdp reduced in bf16": first_gradients(world, **half, **FSDP, reduce_dtype="bf16"),
        "ddp reduced in bf16": first_gradients(world, **half, reduce_dtype="bf16"),
        "dtypes": dtypes_inside(world, **half, **FSDP, **SRA),
        "dtypes alone": dtypes_inside(ALONE, **half, **SRA),
        "times fp32": gradients_at_fractional_times(ALONE),
        "times alone": gradients_at_fractional_times(ALONE, **half),
        "times fsdp": gradients_at_fractional_times(world, **half, **FSDP),
    }
    with casting_inputs():
        found["times cast"] = gradients_at_fractional_times(world, **half, **FSDP)
    return found


def checkpoints(world: World, folder: Path) -> dict:
    """A sharded state after two steps, saved, and loaded into others; each after one more step."""
    config = tiny_config(**FSDP, ema_decay="0.9,0.99")
    state = build(world, config)
    for step in range(2):
        train_step(state, local_batch(state, step))
    saved = checkpoint.save(folder, state)
    official = folder / "official.pt"
    if world.is_main:
        export.export(saved, "official", official)
    world.barrier()
    stored = checkpoint.tensors(state)
    names = [name.removeprefix("model.") for name in stored if name.startswith("model.")]
    train_step(state, local_batch(state, 2))
    found = {"undisturbed": weights(state) | moments(state), "names": names}
    for mode in ({}, FSDP, REPLICATED):
        other = build_state(dataclasses.replace(config, **WHOLE | mode), digits_metadata(), world)
        other.micro_batch = state.micro_batch
        checkpoint.load(saved, other)
        train_step(other, local_batch(other, 2))
        found[f"into {mode.get('parallel', 'ddp')}"] = weights(other) | moments(other)
    one = tiny_config(**FSDP)
    plain, sharded = (
        build_state(config, digits_metadata(), where)
        for config, where in ((dataclasses.replace(one, **WHOLE), ALONE), (one, world))
    )
    for other in (plain, sharded):
        resume.load_official(official, other)
    found["official alone"] = weights(plain) | moments(plain)
    found["official"] = weights(sharded) | moments(sharded)
    return found


def averages(world: World) -> dict:
    """The whole average and its sample grid, of one process and of several."""
    found = {}
    for name, where, mode in (("alone", ALONE, {}), ("fsdp", world, FSDP)):
        state = build(where, tiny_config(num_steps=2, **mode))
        train_step(state, local_batch(state, 0))
        average = state.whole_average(everywhere=False)
        if average is not None:
            found[name] = {k: v.clone() for k, v in average.state_dict().items()}
            found[f"{name} grid"] = torch.from_numpy(sample_grid(state, average))
        found[f"{name} everywhere"] = state.whole_average(everywhere=True).state_dict()
    return found


def oddities(world: World) -> dict:
    """Trial passes on one process alone, a step with one process's NaN, and frozen heads."""
    encoding = build(world, tiny_config(**FSDP, shard_encoder=True))
    state = build(world, tiny_config(**FSDP, **SRA))
    if world.is_main:  # which would wait for the other if they communicated
        for tried in (encoding, state):
            memory.try_pass(memory.stand_in(tried), 4)
    before = weights(state) | moments(state)
    batch = local_batch(state, 0)
    if world.rank == 1:
        batch["moments"] = torch.full_like(batch["moments"], float("nan"))
    train_step(state, batch)
    found = {"skipped": state.metrics.read(world)["skipped"]}
    after = weights(state) | moments(state)
    found["changed"] = [name for name in before if not torch.equal(before[name], after[name])]
    state.end_alignment()
    head = whole(state.model.ap_head.linear1.weight)
    train_step(state, local_batch(state, 1))
    found["head moved"] = not torch.equal(head, whole(state.model.ap_head.linear1.weight))
    found["trains"] = state.metrics.read(world)["skipped"] == 0
    local = [p.to_local().numel() for p in state.model.parameters() if isinstance(p, DTensor)]
    found["held"] = sum(local)
    found["whole"] = [n for n, p in state.model.named_parameters() if not isinstance(p, DTensor)]
    sharded = {type(t) for s in state.optimizer.state.values() for k, t in s.items() if k != "step"}
    found["moments sharded"] = sharded == {DTensor}
    return found


@contextlib.contextmanager
def without_inductor():
    """torch.compile traces and differentiates as ever, and runs the graphs as they are."""
    compile = nn.Module.compile

    def traced(module, **options):
        compile(module, backend="aot_eager", **options)

    with mock.patch.object(nn.Module, "compile", traced):
        yield


def compiled_steps(world: World, name: str) -> dict:
    torch._dynamo.reset()
    counters.clear()
    found = steps(world, name, {**COMPILED[name], "compile": True})
    return found | {"breaks": dict(counters["graph_break"])}


def main() -> None:
    """Under torchrun: every process saves what it found of PART."""
    torch.set_num_threads(1)
    out = Path(os.environ["OUT"])
    part = os.environ["PART"]
    cases = {"few": CASES, "more": MORE_CASES, "four": SQUARES, "compiled": {}}[part]
    with session() as world:
        found = {name: steps(world, name, overrides) for name, overrides in cases.items()}
        if part == "few":
            found |= {
                "precision": precision(world),
                "checkpoints": checkpoints(world, out / "checkpoints"),
                "averages": averages(world),
                "oddities": oddities(world),
            }
            with without_inductor():
                found["traced"] = compiled_steps(world, TRACED)
        if part == "more":
            for name, mode in (("fsdp fp16", FSDP), ("ddp fp16", {})):
                found[name] = first_gradients(world, mixed_precision="fp16", **mode)
        if part == "compiled":
            found = {name: compiled_steps(world, name) for name in COMPILED}
        torch.save(found, out / f"found.{world.rank}")


if __name__ == "__main__":
    main()
