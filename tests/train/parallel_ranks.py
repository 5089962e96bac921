"""Steps of a tiny run under every way to spread it over processes, and what each of them holds."""

import contextlib
import dataclasses
from collections.abc import Callable
from unittest import mock

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from repa_fast.checkpoint import formats
from repa_fast.configs.config import TrainConfig
from repa_fast.data.digits import digits_metadata
from repa_fast.distributed import World
from repa_fast.train import checkpoint, memory, parallel
from repa_fast.train import gradients as summing
from repa_fast.train.evaluate import sample_grid
from repa_fast.train.state import TrainState, build_state
from repa_fast.train.step import accumulate, draw_local, synthetic_batch, train_step
from tests.train.conftest import gradients_of, randomise, tiny_config

STEPS = 3
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
LEAN = {"reshard_after_forward": True, "activation_checkpointing": "full"}
SELECTIVE = {"activation_checkpointing": "selective"}
DDPM = {"objective": "ddpm"}
SRA = {"align": "sra", "block_out_s": 1, "block_out_t": 3}
PLAIN = {"enc_type": "none"}

Tensors = dict[str, torch.Tensor]


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


def local_batch(state: TrainState, step: int) -> Tensors:
    """This process's share of the images of a step."""
    torch.manual_seed(step)
    images, _ = synthetic_batch(state, state.config.images_per_step)
    first = state.world.rank * state.local_batch
    return {key: value[first : first + state.local_batch] for key, value in images.items()}


def everything(state: TrainState) -> Tensors:
    """Whole tensors by the names they are stored under, copied."""
    return {name: whole(tensor) for name, tensor in checkpoint.tensors(state).items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def steps(world: World, overrides: dict) -> dict:
    """Metrics of each step, and all tensors in the beginning and the end; what was compiled.

    Every one of several processes has two micro-batches, unless those change the pool of negatives.
    """
    counters.clear()
    state = build(world, tiny_config(**overrides))
    if world.size > 1 and state.config.loss_type != "nt-xent":
        state.micro_batch = -(-state.local_batch // 2)
    found = {"start": everything(state), "readings": [], "graphs": []}
    found["joint"] = state.model.joint_adaln is not None
    for step in range(STEPS):
        if step and step == state.config.align_until:
            state.end_alignment()
        train_step(state, local_batch(state, step))
        found["readings"].append(state.metrics.read(world))
        found["graphs"].append(counters["stats"]["unique_graphs"])
    return found | {"end": everything(state), "breaks": dict(counters["graph_break"])}


def steps_in_buckets(world: World, overrides: dict, numbers: int) -> dict:
    """The same with gradients in buckets of so many numbers."""
    with mock.patch.object(summing, "BUCKET_NUMBERS", numbers):
        return steps(world, overrides)


def refused_weights(world: World) -> list[str]:
    """What is said where a value, the order of classes or an EMA's value is the last process's own.

    The same weights pass.
    """
    said = []
    table = "y_embedder.embedding_table.weight"
    for harm in (
        lambda state: state.model.state_dict()["final_layer.linear.bias"][0].add_(1e-6),
        lambda state: state.model.state_dict()[table].copy_(state.ema.state_dict()[table].flip(0)),
        lambda state: state.ema.state_dict()["final_layer.linear.bias"][0].add_(1e-6),
    ):
        state = build(world, tiny_config())
        state.expect_same_weights()
        if world.rank == world.size - 1:
            harm(state)
        said.append(message(state.expect_same_weights))
    return said


def refused_gradients(world: World, odd_step: int, swapped: bool) -> str:
    """What is said where the last process has no gradient of a weight, in a step of two.

    It has one of another weight if that is `swapped`.
    """
    used, unused, other = (nn.Parameter(torch.ones(3)) for _ in range(3))
    sums = summing.Gradients([used, unused, other], world, torch.float32)

    def take_steps() -> None:
        for step in range(2):
            taken = [used, unused]
            if step == odd_step and world.rank == world.size - 1:
                taken = [used, other] if swapped else [used]
            with sums.of_pass(first=True, last=True):
                torch.cat(taken).sum().backward()

    return message(take_steps)


def message(call: Callable[[], None]) -> str:
    """What `call` is refused with; "" if it is not."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def traced_steps(world: World, overrides: dict) -> dict:
    """Compiled as ever, but the graphs run as they are."""
    compiled = torch.compile

    def traced(function, *, options=None, **given):
        return compiled(function, backend="eager", **given)

    with mock.patch.object(torch, "compile", traced):
        return steps(world, overrides | {"compile": True})


def gradients(model: nn.Module) -> Tensors:
    return {
        name: whole(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def first_gradients(world: World, overrides: dict, micro_batches: int = 1) -> Tensors:
    """Whole gradients of the first step."""
    state = build(world, tiny_config(**overrides))
    state.micro_batch = state.local_batch // micro_batches
    accumulate(state, local_batch(state, 0), draw_local(state))
    return {name: whole(gradient) for name, gradient in gradients_of(state).items()}


def gradients_at_fractional_times(world: World, overrides: dict, cast: bool = False) -> Tensors:
    """Of the mean square of a DiT's output at times 0..999 in fp32, which bf16 cannot hold.

    cast: whether FSDP casts what enters a unit, as is its own default.
    """
    default = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    patch = mock.patch.object(parallel, "policy", return_value=default)
    with patch if cast else contextlib.nullcontext():
        state = build(world, tiny_config(**DDPM, **PLAIN, **overrides))
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


def dtypes_inside(world: World, overrides: dict) -> dict[str, list]:
    """By module: the dtypes of what it receives, and last that of its weights at that moment."""
    state = build(world, tiny_config(**overrides))
    seen: dict[str, list] = {}

    def note(name: str):
        def hook(module, arguments):
            tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
            seen[name] = [one.dtype for one in (*tensors, next(iter(module.parameters())))]

        return hook

    for name in ("t_embedder", "blocks.1", "blocks.1.attn", "blocks.1.mlp.fc2", "final_layer"):
        state.model.get_submodule(name).register_forward_pre_hook(note(name))
    accumulate(state, local_batch(state, 0), draw_local(state))
    stored = {p.dtype for p in state.model.parameters()}
    reduced = {gradient.dtype for gradient in gradients_of(state).values()}
    return seen | {"stored": [*stored], "gradients": [*reduced]}


def average(world: World, overrides: dict) -> dict:
    """The whole average and its sample grid where they are, and the whole average everywhere."""
    state = build(world, tiny_config(num_steps=2, **overrides))
    train_step(state, local_batch(state, 0))
    found, mine = {}, state.whole_average(everywhere=False)
    if mine is not None:
        found["mine"] = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
        found["grid"] = torch.from_numpy(sample_grid(state, mine))
    return found | {"everywhere": state.whole_average(everywhere=True).state_dict()}


def trial_passes(world: World, overrides: dict) -> bool:
    """The first process tries passes alone; if they communicated, it would wait for the other."""
    state = build(world, tiny_config(**overrides))
    if world.is_main:
        memory.try_pass(memory.stand_in(state), 4)
    return True


def held(world: World, overrides: dict) -> dict:
    """How much of the weights is here after a step, and what is not sharded."""
    state = build(world, tiny_config(**overrides))
    train_step(state, local_batch(state, 0))
    parameters = dict(state.model.named_parameters())
    moments = [t for s in state.optimizer.state.values() for key, t in s.items() if key != "step"]
    return {
        "numbers": sum(p.to_local().numel() for p in parameters.values() if isinstance(p, DTensor)),
        "whole": [name for name, p in parameters.items() if not isinstance(p, DTensor)],
        "moments are sharded": {type(t) for t in moments} == {DTensor},
    }


def with_a_nan(world: World, overrides: dict) -> dict:
    """A good step, one with a NaN on the last process alone, and one whose alignment has ended."""
    state = build(world, tiny_config(**overrides))
    found = {"readings": [], "tensors": [], "heads": []}
    for step in range(3):
        batch = local_batch(state, step)
        if step == 1 and world.rank == world.size - 1:
            batch["moments"] = batch["moments"].clone()
            batch["moments"][0, 0, 0, 0] = float("nan")
        if step == 2:
            state.end_alignment()
        train_step(state, batch)
        found["readings"].append(state.metrics.read(world))
        found["tensors"].append(everything(state))
        found["heads"].append(whole(state.model.ap_head.linear1.weight))
    return found | {"step": state.step, "bad_run": int(state.metrics.bad_run)}


def distance(found: Tensors, wanted: Tensors) -> float:
    """Norm of the difference of all tensors, relative to that of all wanted ones."""
    assert found.keys() == wanted.keys()
    difference = {name: found[name].double() - tensor.double() for name, tensor in wanted.items()}
    return (joined(difference).norm() / joined(wanted).norm()).item()


def joined(tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()])


def only(tensors: Tensors, *prefixes: str) -> Tensors:
    """Those of a kind: model, ema, ema_2 or optimizer; a step's number would hide what differs."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name.split(".")[0] in prefixes and not name.endswith(".step")
    }


def unequal(found: Tensors, wanted: Tensors) -> list[str]:
    """Names of the tensors that are not the same bits; both have the same names."""
    assert found.keys() == wanted.keys()
    return [name for name in wanted if not torch.equal(found[name], wanted[name])]
