"""What the compiler makes of every kernel, for GPUs that need not be there.

    python -m benchmarks.kernels.resources            # the table
    python -m benchmarks.kernels.resources --write    # into docs/performance.md

Registers, spills and shared memory are those of the cubin (cuobjdump), accesses those of the PTX.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from benchmarks.harness.environment import ROOT
from repa_fast.backend.launch import Launch
from repa_fast.kernels.adaln import triton_kernels as adaln
from repa_fast.kernels.align_loss import triton_kernels as align_loss
from repa_fast.kernels.euler_maruyama_step import triton_kernels as euler_maruyama_step
from repa_fast.kernels.gate_residual_adaln import triton_kernels as gate_residual_adaln

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- resources: begin -->", "<!-- resources: end -->"

CAPABILITIES = (80, 90, 100)
WIDTHS = (384, 768, 1024, 1152)
DTYPES = (  # residual stream, branch and modulation
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
)
BATCH, TOKENS = 32, 256
REGISTERS_PER_SM, THREADS_PER_SM = 65536, {80: 2048, 90: 2048, 100: 2048}
SHARED_PER_SM = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # bytes


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel.

    Attributes:
        registers: per thread.
        spilled: bytes of stack per thread.
        shared: bytes per block, what the driver reserves included.
        blocks: that fit on one SM together.
        wide: accesses of 16 bytes among all vectorisable global ones.
        narrow: the others.
        asynchronous: of the wide ones, those that are cp.async.
    """

    registers: int
    spilled: int
    shared: int
    blocks: int
    wide: int
    narrow: int
    asynchronous: int


def resources(launch: Launch, capability: int) -> Resources:
    """Compile for `capability` and read the result."""
    compiled = launch.compile(capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", dump)}
    shared = compiled.metadata.shared + 1024  # one KiB a block is the system's
    wide, narrow, asynchronous = accesses(compiled.asm["ptx"])
    threads = 32 * launch.warps
    granule = 8 * -(-usage["REG"] // 8)
    blocks = min(
        REGISTERS_PER_SM // (granule * threads),
        THREADS_PER_SM[capability] // threads,
        SHARED_PER_SM[capability] // shared,
        32,
    )
    return Resources(usage["REG"], usage["STACK"], shared, blocks, wide, narrow, asynchronous)


def accesses(ptx: str) -> tuple[int, int, int]:
    """Global accesses of 16 bytes, narrower ones, and the cp.async among the former."""
    asynchronous = [int(size, 0) for size in re.findall(r"cp\.async[^;]*?\], (0x\w+|\d+)", ptx)]
    vectors = re.findall(r"(?:ld|st)\.global[^ ]*?\.(v[24])?\.?b(\d+)", ptx)
    sizes = [int(bits) // 8 * int(vector[1:] or 1 if vector else 1) for vector, bits in vectors]
    wide = sum(size == 16 for size in sizes) + sum(size == 16 for size in asynchronous)
    narrow = sum(size < 16 for size in sizes) + sum(size < 16 for size in asynchronous)
    return wide, narrow, sum(size == 16 for size in asynchronous)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(width: int, stream: torch.dtype, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of every kernel that works on rows, at SiT's batch and tokens."""
    x, branch = empty(BATCH, TOKENS, width, dtype=stream), empty(BATCH, TOKENS, width, dtype=dtype)
    vector = empty(BATCH, 6 * width, dtype=dtype)[:, :width]
    statistics = empty(BATCH, TOKENS, 2)
    patches, dloss = empty(BATCH, TOKENS, 4), empty(BATCH)
    partials = {count: adaln.empty_partials(branch, count) for count in (1, 2, 3)}
    yield "adaln forward", adaln.adaln_forward_launch(x, vector, vector, branch, statistics, 1e-6)
    yield (
        "adaln backward",
        adaln.adaln_backward_launch(branch, x, vector, statistics, x, partials[2]),
    )
    yield (
        "gate_residual forward",
        gate_residual_adaln.gate_residual_forward_launch(x, branch, vector, x),
    )
    yield (
        "gate_residual backward",
        gate_residual_adaln.gate_residual_backward_launch(x, branch, vector, branch, partials[1]),
    )
    yield (
        "gate_residual_adaln forward",
        gate_residual_adaln.gate_residual_adaln_forward_launch(
            x, branch, vector, vector, vector, x, branch, statistics, 1e-6
        ),
    )
    yield (
        "gate_residual_adaln backward",
        gate_residual_adaln.gate_residual_adaln_backward_launch(
            branch, x, x, branch, vector, vector, statistics, x, branch, partials[3]
        ),
    )
    yield "sum of chunks", adaln.sum_chunks_launch(partials[3], empty(3, BATCH, width, dtype=dtype))
    yield (
        "align_loss forward",
        align_loss.align_loss_forward_launch(branch, branch, patches, 1e-12),
    )
    yield (
        "align_loss backward",
        align_loss.align_loss_backward_launch(dloss, branch, branch, patches, branch),
    )


def sampler_launches(state: torch.dtype, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """The variants of euler_maruyama_step: Euler, given noise, drawn noise."""
    x, v = empty(64, 4, 32, 32, dtype=state), empty(64, 4, 32, 32, dtype=dtype)
    index = empty(64, dtype=torch.int64)
    for name, noise, numbers in (("", None, None), (" noise", x, None), (" drawn", None, index)):
        yield (
            f"euler_maruyama_step{name}",
            euler_maruyama_step.euler_maruyama_step_launch(
                x, v, v, noise, numbers, x, v, [1.0, 0.5, 0.1], 1.5, 7, 0
            ),
        )


def table() -> str:
    """Markdown, at SiT-XL/2's width with an fp32 and a bf16 residual stream, bf16 otherwise."""
    lines = [
        f"Triton {triton.__version__}, D = 1152, bf16 branches and modulation; blocks are those",
        "that fit on one SM, accesses the global ones of 16 bytes (of these, cp.async) + narrower.",
        "",
        "| kernel | stream | sm | warps | registers | spilled B | shared B | blocks | accesses |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = [
        (name, stream, launch)
        for stream in (torch.float32, torch.bfloat16)
        for name, launch in launches(1152, stream, torch.bfloat16)
    ]
    rows += [
        (name, stream, launch)
        for stream in (torch.float32, torch.float64)
        for name, launch in sampler_launches(stream, torch.bfloat16)
    ]
    for name, stream, launch in rows:
        for capability in CAPABILITIES:
            r = resources(launch, capability)
            lines.append(
                f"| {name} | {str(stream).removeprefix('torch.')} | {capability} | {launch.warps} "
                f"| {r.registers} | {r.spilled} | {r.shared} | {r.blocks} "
                f"| {r.wide} ({r.asynchronous}) + {r.narrow} |"
            )
    return "\n".join(lines)


def write(text: str) -> None:
    """Put the table between its marks in docs/performance.md."""
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    arguments = parser.parse_args()
    text = table()
    if arguments.write:
        write(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
