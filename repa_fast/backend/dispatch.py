"""Which implementation of an op runs: its Triton kernels or its plain torch reference.

Asked for per call (`implementation=`), per process (`use_kernels`, `--kernels` on the command line)
or in the environment (REPA_FAST_KERNELS), in this order. `triton` and `reference` run or raise;
`auto` takes the kernels where they can run and says once why it takes what it takes.
"""

import functools
import importlib.util
import logging
import os
import sys

import torch

from repa_fast.contracts import expect_choice

IMPLEMENTATIONS = ("auto", "triton", "reference")
VARIABLE = "REPA_FAST_KERNELS"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_log = logging.getLogger(__name__)
_asked_of_process: str | None = None


def use_kernels(implementation: str | None) -> None:
    """Set what this process asks for where a call does not say; None leaves it to the environment.

    Raises:
        ValueError: not one of IMPLEMENTATIONS.
    """
    global _asked_of_process
    if implementation is not None:
        expect_choice("kernels", implementation, IMPLEMENTATIONS)
    if implementation != _asked_of_process and "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # compiled code has the choice built in
    _asked_of_process = implementation


def asked() -> str:
    """What this process asks for.

    Raises:
        ValueError: the environment asks for something unknown.
    """
    if _asked_of_process is not None:
        return _asked_of_process
    implementation = os.environ.get(VARIABLE) or "auto"
    expect_choice(VARIABLE, implementation, IMPLEMENTATIONS)
    return implementation


def runs_triton(
    op: str,
    implementation: str | None,
    *tensors: torch.Tensor,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> bool:
    """Whether `op` runs its kernels on these tensors, which `dtypes` its kernels can take.

    Raises:
        ValueError: unknown implementation, or kernels asked for that cannot run, with the reason;
            tensors on several devices.
    """
    device, foreign = tensors[0].device, ""
    for tensor in tensors:
        if tensor.device != device:
            raise ValueError(f"{op}: tensors on {device} and {tensor.device}, expected one device")
        if tensor.dtype not in dtypes:
            foreign = str(tensor.dtype)
    return _runs_triton(op, implementation, device.type, foreign)


def describe(device: str) -> str:
    """What a call that names no implementation runs on this kind of device, and why.

    Raises:
        ValueError: kernels asked for that cannot run, with the reason.
    """
    implementation = asked()
    if implementation == "auto":
        reason = why_not_triton(device)
        return f"reference, since {reason}" if reason else "Triton"
    _runs_triton("kernels", implementation, device, "")
    return f"{implementation}, asked for"


@torch.compiler.assume_constant_result
def _runs_triton(op: str, implementation: str | None, device: str, foreign: str) -> bool:
    if implementation is None:
        implementation = asked()
    expect_choice(f"{op}: implementation", implementation, IMPLEMENTATIONS)
    if implementation == "reference":
        return False
    reason = why_not_triton(device) or (foreign and f"the kernels do not take {foreign}")
    if implementation == "triton" and reason:
        raise ValueError(f"{op}: implementation is 'triton', but {reason}")
    if implementation == "auto":
        _say_once(op, reason)
    return not reason


@functools.cache
def why_not_triton(device: str) -> str:
    """Why Triton kernels cannot run on tensors of this kind of device; "" if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    if device == "cpu":
        return "" if triton.knobs.runtime.interpret else "the tensors are on the CPU"
    if device != "cuda":
        return f"the tensors are on {device}"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return ""


@functools.cache
def _say_once(op: str, reason: str) -> None:
    _log.info("%s: %s", op, f"reference, since {reason}" if reason else "Triton kernels")
