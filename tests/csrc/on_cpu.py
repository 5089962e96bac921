"""csrc's kernels compiled by g++ under sanitizers, and stand-ins for the operators."""

import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
HEADER = HERE.parents[1] / "csrc" / "adamw_ema" / "kernels.cuh"
FLAGS = (
    "-std=c++17", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
    "-fsanitize-sections=shared_memory",
)  # fmt: skip
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


def why_not() -> str | None:
    """Why they cannot be compiled, or None."""
    if sys.platform != "linux":
        return "needs Linux"
    return None if shutil.which("g++") else "g++ is not installed"


def compiled(folder: Path, header: str) -> Path:
    """A program of adamw_ema.cpp with this text in the place of csrc's header, made in `folder`."""
    (folder / HEADER.name).write_text(header)
    program = folder / "adamw_ema"
    command = ["g++", *FLAGS, f"-I{HERE}", f"-I{folder}", HERE / "adamw_ema.cpp", "-o", program]
    done = subprocess.run(command, capture_output=True, text=True)
    if re.search(r"cannot find .*l(ib)?(a|ub)san", done.stderr):
        pytest.skip("g++ has no sanitizers")
    assert done.returncode == 0, done.stderr
    return program


def written(tensor: torch.Tensor | None) -> bytes:
    """A tensor for the program: bytes, bytes behind a multiple of 16, and its elements."""
    if tensor is None:
        return struct.pack("qq", 0, 0)
    data = tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
    return struct.pack("qq", len(data), tensor.data_ptr() % 16) + data


def head(grad: torch.Tensor) -> bytes:
    return struct.pack("qq", grad.numel(), grad.dtype == torch.bfloat16)


class Operators:
    """Stands for torch.ops.repa_fast; `fault` is the number of one in the program, 0 for none."""

    def __init__(self, program: Path, fault: int = 0):
        self.program, self.fault = program, fault

    def run(self, operator: str, parts: Iterable[bytes]) -> memoryview:
        """What the program writes; AssertionError with its words if it ends badly."""
        done = subprocess.run(
            [self.program, operator, str(self.fault)], input=b"".join(parts), capture_output=True,
            env=os.environ | OPTIONS,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return memoryview(bytearray(done.stdout))

    def adamw_ema(
        self, params, grads, exp_avgs, exp_avg_sqs, steps, emas, param_copies,
        lr, grad_scale, skip, ema_rate, factors, *numbers,
    ):  # fmt: skip
        count = len(params)
        scalars = [written(scalar) for scalar in (lr, grad_scale, skip, ema_rate)]
        parts = [struct.pack("4d", *numbers), *scalars, struct.pack("q", count)]
        lists = (params, grads, exp_avgs, exp_avg_sqs, steps, emas, param_copies)
        rows = list(zip(*(tensors or [None] * count for tensors in lists), strict=True))
        for row in rows:
            parts += [head(row[1]), *map(written, row)]
        output, done = self.run("adamw_ema", parts), 0
        for tensor in (tensor for row in rows for tensor in row if tensor is not None):
            size = tensor.numel() * tensor.element_size()
            if size:
                values = torch.frombuffer(
                    output, dtype=tensor.dtype, count=tensor.numel(), offset=done
                )
                tensor.detach().copy_(values.view(tensor.shape))
            done += size
        assert done == len(output)

    def sum_of_squares(self, grads, partials, out):
        parts = [struct.pack("q", len(grads))]
        for grad in grads:
            parts += [head(grad), written(grad)]
        out.copy_(torch.frombuffer(self.run("sum_of_squares", parts), dtype=torch.float64)[0])
