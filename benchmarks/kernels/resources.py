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
from benchmarks.harness.rows import filled, grid, marks
from benchmarks.kernels.tune import KERNELS, call, constants, sources
from repa_fast.backend.launch import Launch
from repa_fast.backend.rows import empty_partials, sum_chunks_launch

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = marks("resources")
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
    """What one compiled kernel takes."""

    registers: int  # per thread
    spilled: int  # bytes of stack per thread
    shared: int  # bytes per block, what the driver reserves included
    blocks: int  # that fit on one SM together
    wide: int  # accesses of 16 bytes among all vectorisable global ones
    narrow: int  # the others
    asynchronous: int  # of the wide ones, those that are cp.async


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
    """Count global accesses of 16 bytes, narrower ones, and the cp.async among the former."""
    asynchronous = [int(size, 0) for size in re.findall(r"cp\.async[^;]*?\], (0x\w+|\d+)", ptx)]
    vectors = re.findall(r"(?:ld|st)\.global[^ ]*?\.(v[24])?\.?b(\d+)", ptx)
    sizes = [int(bits) // 8 * int(vector[1:] or 1) for vector, bits in vectors] + asynchronous
    narrow = sum(size < 16 for size in sizes)
    return sizes.count(16), narrow, asynchronous.count(16)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(width: int, stream: torch.dtype, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """Return (name, launch) of every kernel that works on rows, at SiT's batch and tokens."""
    x, branch = empty(BATCH, TOKENS, width, dtype=stream), empty(BATCH, TOKENS, width, dtype=dtype)
    vector = empty(BATCH, 6 * width, dtype=dtype)[:, :width]
    known = dict.fromkeys(("x", "out", "dx", "dout"), x)
    known |= dict.fromkeys(("branch", "y", "dbranch", "dy"), branch)
    known |= dict.fromkeys(("prediction", "target", "dprediction"), branch)
    known |= dict.fromkeys(("gate", "shift", "scale"), vector)
    known |= {"statistics": empty(BATCH, TOKENS, 2), "patches": empty(BATCH, TOKENS, 4)}
    known["dloss"] = empty(BATCH)
    for op in ("adaln", "gate_residual", "gate_residual_adaln", "align_loss"):
        for way in ("forward", "backward"):
            function = getattr(sources(op), f"{op}_{way}_launch")
            partials = empty_partials(branch, len(KERNELS[f"{op}_{way}"][2]))
            yield f"{op} {way}", call(function, {**known, **constants(op), "partials": partials})
        if op == "gate_residual_adaln":
            sums = empty(3, BATCH, width, dtype=dtype)
            yield "sum of chunks", sum_chunks_launch(partials, sums)


def sampler_launches(state: torch.dtype, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """Return the variants of euler_maruyama_step: Euler, given noise, drawn noise."""
    x, v = empty(64, 4, 32, 32, dtype=state), empty(64, 4, 32, 32, dtype=dtype)
    index = empty(64, dtype=torch.int64)
    known = {"x": x, "out": x, "copy": v, "v_cond": v, "v_uncond": v, "factors": [1.0, 0.5, 0.1]}
    known |= {"cfg_scale": 1.5, "seed": 7, "step": 0}
    function = sources("euler_maruyama_step").euler_maruyama_step_launch
    for name, noise, numbers in (("", None, None), (" noise", x, None), (" drawn", None, index)):
        drawn = {"noise": noise, "index": numbers}
        yield f"euler_maruyama_step{name}", call(function, {**known, **drawn})


def table() -> str:
    """Return Markdown, for SiT-XL/2's width, fp32 and bf16 residual streams, bf16 otherwise."""
    text = [
        f"Triton {triton.__version__}, D = 1152, branches and modulation in bf16. The column "
        "blocks counts the blocks that fit on one SM together. The column accesses counts "
        "accesses to global memory: those of 16 bytes (how many of them are cp.async) + "
        "narrower ones.",
        "",
    ]
    heads = ("kernel", "stream", "sm", "warps", "registers", "spilled B", "shared B", "blocks")
    f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16
    compiled = [(s, *found) for s in (f32, bf16) for found in launches(1152, s, bf16)]
    compiled += [(s, *found) for s in (f32, f64) for found in sampler_launches(s, bf16)]
    rows = []
    for stream, name, launch in compiled:
        for capability in CAPABILITIES:
            r = resources(launch, capability)
            of = (name, str(stream).removeprefix("torch."), capability, launch.warps)
            accesses = f"{r.wide} ({r.asynchronous}) + {r.narrow}"
            rows.append((*of, r.registers, r.spilled, r.shared, r.blocks, accesses))
    return "\n".join([*text, *grid((*heads, "accesses"), rows)]).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    if parser.parse_args().write:
        PAGE.write_text(filled(PAGE.read_text(), "resources", table()))
    else:
        print(table())


if __name__ == "__main__":
    main()
