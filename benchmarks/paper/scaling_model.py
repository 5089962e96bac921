"""A model on paper of the training step on many GPUs, for benchmarks/paper/scaling.py.

Arithmetic from the FLOPs and bytes that the benchmarks count and from the constants of `Machine`;
nothing here is measured. Seconds, bytes and FLOPs throughout.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.step import traffic
from benchmarks.step.optim import BYTES as OPTIMIZER_BYTES
from repa_fast import encoders
from repa_fast.configs.build import expected_metadata, fit_to_data, model_arguments
from repa_fast.configs.config import TrainConfig
from repa_fast.data.dataset import Metadata
from repa_fast.objective import build_alignment
from repa_fast.train.gradients import BUCKET_NUMBERS
from repa_fast.train.memory import budget
from repa_fast.train.parallel import region_size

BUCKET_BYTES = 4 * BUCKET_NUMBERS
BLOCK, ENCODER = 32 * 256 * 1152, 32 * 257 * 768 * 12
"""Images x tokens x width (x blocks) of what is counted: a block of SiT-XL/2, and DINOv2-B."""
JPEG_BYTES_PER_PIXEL = 0.25  # 16 kB at 256 x 256, benchmarks/results/cpu/2026-11-21_data


def constant(default: float, scale: float, unit: str, source: str) -> float:
    """Return a field of Machine, with what the page says of it."""
    return field(default=default, metadata={"scale": scale, "unit": unit, "source": source})


@dataclass(frozen=True)
class Machine:
    """Nodes of H200, in SI units. Every field is a flag and a line of the page."""

    matmul: float = constant(790e12, 1e12, "TFLOP/s", "H200, bf16 matmul of 8192^3, reported")
    memory: float = constant(4.3e12, 1e12, "TB/s", "H200, copy within device memory, reported")
    reached: float = constant(0.85, 0.01, "%", "assumed share of these rates that a step reaches")
    launches: int = constant(1200, 1, "kernels", "assumed per step: the goal, without a CUDA graph")
    launch: float = constant(5e-6, 1e-6, "us", "assumed host time of a launch")
    node: int = constant(8, 1, "GPUs", "HGX board")
    nvlink: float = constant(450e9, 1e9, "GB/s", "H200 datasheet: NVLink per GPU and direction")
    network: float = constant(360e9, 1e9, "GB/s", "per node: 8 x 400 Gb/s InfiniBand, 90 % assumed")
    ring_nvlink: float = constant(1.9e-6, 1e-6, "us", "NCCL's tuning table, LL128: a ring's hop")
    ring_network: float = constant(4e-6, 1e-6, "us", "the same, between nodes")
    tree_nvlink: float = constant(1.2e-6, 1e-6, "us", "NCCL's tuning table, LL128: a tree's hop")
    tree_network: float = constant(8.5e-6, 1e-6, "us", "the same, between nodes")
    noise: float = constant(0.01, 0.01, "%", "assumed standard deviation of a GPU's own step time")
    host_copy: float = constant(50e9, 1e9, "GB/s", "assumed: a GPU to host memory, PCIe 5 x16")
    files_node: float = constant(5e9, 1e9, "GB/s", "assumed: a node's share of the file system")
    files: float = constant(50e9, 1e9, "GB/s", "assumed: the file system, for all nodes together")

    def nodes(self, gpus: int) -> int:
        return -(-gpus // self.node)

    def file_rate(self, gpus: int) -> float:
        """Return the bytes per second that so many GPUs read or write together."""
        return min(self.files, self.nodes(gpus) * self.files_node)


@dataclass(frozen=True)
class Mode:
    """How parameters are spread. The all-gather is in bf16 and happens once a step."""

    sharded: str  # "no", over "all" GPUs, or inside each "node", replicated across nodes
    reduce_bytes: int  # of a gradient on the way

    def shards(self, machine: Machine, gpus: int) -> int:
        """Return the number of parts into which optimizer state is cut."""
        return {"no": 1, "all": gpus, "node": min(gpus, machine.node)}[self.sharded]


MODES = {
    "ddp": Mode("no", 4),
    "fsdp": Mode("all", 4),
    "fsdp bf16": Mode("all", 2),
    "hsdp": Mode("node", 4),
    "hsdp bf16": Mode("node", 2),
}


@dataclass(frozen=True)
class Pass:
    """FLOPs of matmuls and bytes of elementwise kernels, per image."""

    flops: float
    nbytes: float
    launches: int  # counted in those of a block's forward pass

    def seconds(self, batch: float, machine: Machine) -> tuple[float, float]:
        """Return the seconds of the matmuls and of the elementwise kernels."""
        rates = machine.matmul * machine.reached, machine.memory * machine.reached
        return batch * self.flops / rates[0], batch * self.nbytes / rates[1]


@dataclass(frozen=True)
class Work:
    """What a preset's step has to do."""

    parameters: int  # trained ones, projectors included
    groups: int  # of parameters gathered and reduced together: the blocks, and the rest
    regions: int  # of blocks compiled as one, whose gradients come at once under ddp
    frozen: Pass  # of the encoder, or of SRA's teacher
    forward: Pass
    backward: Pass  # with attention's scores computed again
    activation_bytes: float  # saved for backward, per image
    state_bytes: float  # fp32 weights, gradients, two moments and EMAs, unsharded
    checkpoint_steps: int  # between checkpoints, which hold the state without gradients
    image_bytes: dict[str, float]  # read per image, by how images are stored
    attention: tuple[float, float]  # FLOPs (of those of both passes) and bytes, per image

    @property
    def checkpoint_bytes(self) -> float:
        return self.state_bytes - 4 * self.parameters


def block_bytes(tokens: int, width: int, passes: Sequence[str] = traffic.PASSES) -> float:
    """Return bytes per image of a block's elementwise kernels, as counted of SiT-XL/2's.

    They are in proportion to tokens and width.
    """
    kinds = ("elementwise", "stack")
    return tokens * width * traffic.moved("block", 32, kinds=kinds, passes=passes) / BLOCK


def attention_work(tokens: int, width: int) -> tuple[float, float]:
    """Return FLOPs and bytes of a block's attention, both passes, per image, in bf16.

    2 matmuls of N x N x D forward and 5 backward; bytes in proportion to those of SiT-XL/2.
    """
    nbytes = traffic.moved("block", 32, kinds=("attention",))
    return 7 * 2 * tokens**2 * width, tokens * width * nbytes / BLOCK


def work(config: TrainConfig) -> Work:
    """Count a step's work from its config."""
    metadata = expected_metadata(config)
    config = fit_to_data(config, metadata)
    counted = budget(config, metadata)
    arguments = model_arguments(config, metadata)
    width, depth = arguments["hidden_size"], arguments["depth"]
    tokens = (arguments["input_size"] // arguments["patch_size"]) ** 2
    resolution = config.resolution
    specs = encoders.specs("none" if config.features else config.enc_type)
    layers = [(s.depth, s.num_tokens(resolution) + s.prefix, s.width) for s in specs]
    frozen_bytes = sum(map(math.prod, layers)) / ENCODER * traffic.moved("encoder", 32)
    if teacher_depth := build_alignment(config).teacher_depth:
        layers = [(teacher_depth, tokens, width)]
        frozen_bytes = teacher_depth * block_bytes(tokens, width, ("forward",))
    scores = 2 * tokens**2 * width * depth
    forward_flops = (counted.train_flops - counted.encoder_flops) / 3
    forward, backward = (depth * block_bytes(tokens, width, (name,)) for name in traffic.PASSES)
    return Work(
        parameters=counted.parameters_with_projectors,
        groups=depth + 1,
        regions=depth // region_size(depth, arguments["encoder_depth"]),
        frozen=Pass(counted.encoder_flops, frozen_bytes, sum(n for n, *_ in layers)),
        forward=Pass(forward_flops, forward, depth),
        backward=Pass(2 * forward_flops + scores, backward, 2 * depth),
        activation_bytes=counted.activation_bytes,
        state_bytes=counted.state_bytes,
        checkpoint_steps=config.checkpointing_steps,
        image_bytes=stored_bytes(metadata, [(s.num_tokens(resolution), s.width) for s in specs]),
        attention=tuple(depth * each for each in attention_work(tokens, width)),
    )


def stored_bytes(metadata: Metadata, features: list[tuple[int, int]]) -> dict[str, float]:
    """Return the bytes of a row by what it holds; `features` are (tokens, width) per encoder."""
    moments = 4 * 2 * math.prod(metadata.latent_shape)
    found = {"moments": moments}
    if features:
        found["moments, JPEG"] = moments + JPEG_BYTES_PER_PIXEL * metadata.resolution**2
        found["moments, PNG (at most raw pixels)"] = moments + 3 * metadata.resolution**2
        found["moments, int8 features"] = moments + sum(n * (d + 4) for n, d in features)
        found["moments, fp16 features"] = moments + sum(2 * n * d for n, d in features)
    return found


def volume(kind: str, ranks: int) -> float:
    """Return the bytes that each rank sends in a ring, per byte of the whole tensor.

    n - 1 steps of 1/n each; all-reduce is a reduce-scatter and an all-gather.
    """
    return (2 if kind == "all-reduce" else 1) * (ranks - 1) / ranks


def latency(kind: str, ranks: int, nodes: int, machine: Machine) -> float:
    """Return seconds of a collective without data: hops of a ring, or of a tree in an all-reduce.

    As NCCL's tuning counts them: a ring's data crosses every link, a tree goes up and down.
    """
    ring = (ranks - nodes) * machine.ring_nvlink + (nodes - 1) * machine.ring_network
    if kind != "all-reduce":
        return ring
    inside, across = ranks // nodes - 1, math.log2(nodes)
    return 2 * min(ring, inside * machine.tree_nvlink + across * machine.tree_network)


def collective(
    kind: str, nbytes: float, calls: int, ranks: int, nodes: int, machine: Machine
) -> float:
    """Return seconds of `calls` collectives of together `nbytes`, rings over all of a node's NICs.

    For groups of one GPU per node, side by side, `nbytes` are those of all groups of a node.
    """
    bandwidth = machine.nvlink if nodes == 1 else min(machine.nvlink, machine.network)
    return volume(kind, ranks) * nbytes / bandwidth + calls * latency(kind, ranks, nodes, machine)


@dataclass(frozen=True)
class Communication:
    """Seconds of the collectives under each pass, in so many pieces, and of one after them."""

    forward: float
    backward: float
    pieces: int
    end: float


def communication(work: Work, machine: Machine, mode: Mode, gpus: int) -> Communication:
    """Return the communication of a step of `gpus`."""
    if gpus == 1:
        return Communication(0, 0, 1, 0)
    nodes = machine.nodes(gpus)
    gradients = work.parameters * mode.reduce_bytes
    if mode.sharded == "no":
        buckets = math.ceil(gradients / BUCKET_BYTES)
        reduce = collective("all-reduce", gradients, buckets, gpus, nodes, machine)
        return Communication(0, reduce, min(buckets, work.regions), 0)
    ranks, span = (gpus, nodes) if mode.sharded == "all" else (min(gpus, machine.node), 1)
    groups = work.groups
    gather = collective("all-gather", 2 * work.parameters, groups, ranks, span, machine)
    scatter = collective("reduce-scatter", gradients, groups, ranks, span, machine)
    across = 0.0
    if mode.sharded == "node" and nodes > 1:
        across = collective("all-reduce", gradients, groups, nodes, nodes, machine)
    # two links at work at once: the slower one, and one piece of the other
    reduce = max(scatter, across) + min(scatter, across) / groups
    norm = latency("all-reduce", ranks, span, machine)  # of the gradient, over the shards
    return Communication(gather, reduce, groups, norm)


def exposed(window: float, seconds: float, pieces: int) -> float:
    """Return what equal pieces of communication add to a pass of `window` seconds.

    A piece starts when its part of the pass is there and the piece before it is through, and
    likewise, run backwards, for gathers that a pass waits for.
    """
    return max(seconds / pieces, seconds - window * (1 - 1 / pieces))


@functools.cache
def expected_maximum(count: int) -> float:
    """Return that of `count` independent standard normals, from the maximum's distribution.

    E = b - integral from -b to b of F(x)^n dx, with nothing to speak of beyond b = 12; the midpoint
    rule is exact to rounding for so smooth a function that is flat at both ends.
    """
    from scipy.special import ndtr

    width = 1e-3
    x = width * (np.arange(24_000) + 0.5) - 12
    return float(12 - width * (ndtr(x) ** count).sum())


@dataclass(frozen=True)
class Step:
    """Seconds of a step by what they go to; they add up to the step."""

    matmul: float
    elementwise: float
    copies: float
    optimizer: float
    launches: float
    communication: float
    stragglers: float
    files: float

    @property
    def seconds(self) -> float:
        return sum(dataclasses.astuple(self))


def copies(mode: Mode, shards: int, gpus: int) -> tuple[float, float]:
    """Return bytes per parameter of casting and copying weights and gradients: forward, backward.

    Under ddp, bf16 gradients are added up in fp32, and rounded again where they are sent in bf16.
    FSDP2 casts a shard, copies weights out of the gathered buffer and gradients, cast, into the one
    to be reduced.
    """
    if gpus == 1:
        return 0, 0
    if mode.sharded == "no":
        return 0, 6 if mode.reduce_bytes == 4 else 12
    return 6 / shards + 4, 2 + mode.reduce_bytes


def step(work: Work, machine: Machine, mode: Mode, gpus: int, batch: float) -> Step:
    """Return a step of `gpus` with `batch` images on each, read as moments and JPEG."""
    bandwidth = machine.memory * machine.reached
    shards = mode.shards(machine, gpus)
    passes = (work.frozen, work.forward, work.backward)
    copied = [work.parameters * nbytes / bandwidth for nbytes in copies(mode, shards, gpus)]
    matmul, elementwise = zip(*(each.seconds(batch, machine) for each in passes))
    device = [sum(parts) for parts in zip(matmul, elementwise, (0.0, *copied))]
    host = machine.launches * machine.launch / sum(each.launches for each in passes)
    lasting = [max(time, host * each.launches) for time, each in zip(device, passes)]
    optimizer = sum(OPTIMIZER_BYTES.values()) * work.parameters / shards / bandwidth
    sent = communication(work, machine, mode, gpus)
    windows = zip(lasting[1:], (sent.forward, sent.backward))
    communicated = sum(exposed(*window, sent.pieces) for window in windows) + sent.end
    own = sum(lasting) + optimizer
    stragglers = machine.noise * own * expected_maximum(gpus)
    read = gpus * batch * work.image_bytes[usual(work)] / machine.file_rate(gpus)
    found = {"matmul": sum(matmul), "elementwise": sum(elementwise), "copies": sum(copied)}
    found |= {"optimizer": optimizer, "launches": sum(lasting) - sum(device)}
    found |= {"communication": communicated, "stragglers": stragglers}
    return Step(**found, files=max(0.0, read - own - communicated - stragglers))


def usual(work: Work) -> str:
    """Return how images are stored by default: with JPEG if the step reads pixels."""
    return next((name for name in work.image_bytes if "JPEG" in name), "moments")
