"""Which of several implementations runs, and for an op: its Triton kernels or its reference.

`choose` is how all of them are chosen. An op's implementation is asked for per call
(`implementation=`), per process (`use_kernels`, `--kernels` on the command line) or in the
environment (REPA_FAST_KERNELS), in this order.
"""

import functools
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from repa_fast.contracts import expect_choice

IMPLEMENTATIONS = ("auto", "triton", "reference")
VARIABLE = "REPA_FAST_KERNELS"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_log = logging.getLogger(__name__)
_asked_of_process: str | None = None


def choose(
    name: str,
    asked: str,
    candidates: Mapping[str, Callable[[], str]],
    words: Mapping[str, str] | None = None,
) -> tuple[str, str]:
    """Return the candidate that runs, and why: it is asked for, the default, or "since ...".

    "auto" takes the first that nothing is against, and logs once what it takes and why. Any other
    runs or raises.

    Args:
        name: what is chosen, "option" or "op: option"; the log line begins with what is before the
            colon.
        asked: "auto" or one of the candidates.
        candidates: the preferred one first; each with what returns why it cannot run, "" if it can,
            which is called only for a candidate that is considered.
        words: what the log calls candidates whose names do not say it.

    Raises:
        ValueError: an unknown name; or what is asked for, or under "auto" everything, cannot run,
            with the reason.
    """
    expect_choice(name, asked, ("auto", *candidates))
    if asked != "auto":
        reason = candidates[asked]()
        if reason:
            raise ValueError(f"{name} is {asked!r}, but {reason}")
        return asked, "asked for"
    against: list[str] = []
    for candidate, why_not in candidates.items():
        reason = why_not()
        if not reason:
            since = f"since {'; '.join(against)}" if against else ""
            word = (words or {}).get(candidate, candidate)
            _say_once(name.partition(":")[0], f"{word}, {since}" if since else word)
            return candidate, since or "by default"
        against.append(reason)
    raise ValueError(f"{name} is 'auto', but nothing can run: {'; '.join(against)}")


def runs() -> str:
    """Return "", nothing being against a candidate that runs everywhere."""
    return ""


@functools.cache
def _say_once(subject: str, what: str) -> None:
    _log.info("%s: %s", subject, what)


def use_kernels(implementation: str | None) -> None:
    """Set what calls that name none ask for, or ValueError; None leaves it to the environment."""
    global _asked_of_process
    if implementation is not None:
        expect_choice("kernels", implementation, IMPLEMENTATIONS)
    if implementation != _asked_of_process and "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # compiled code has the choice built in
    _asked_of_process = implementation


def asked() -> str:
    """Return what this process asks for; ValueError if the environment's is unknown."""
    if _asked_of_process is not None:
        return _asked_of_process
    implementation = os.environ.get(VARIABLE) or "auto"
    expect_choice(VARIABLE, implementation, IMPLEMENTATIONS)
    return implementation


def runs_triton(
    op: str, implementation: str | None, *tensors: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> bool:
    """Return whether `op` runs its kernels on these tensors; `dtypes` are what these can take.

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
    """Return what a call that names no implementation runs on this device, and why; or raise."""
    return ", ".join(chosen(device))


def chosen(device: str, implementation: str | None = None) -> tuple[str, str]:
    """Return what a call runs on this device, and why, as of `choose`; None asks the process."""
    return _chosen("kernels", implementation, device, "")


def constant_when_compiled(function):
    """torch.compiler.assume_constant_result, which imports the compiler: two seconds a process."""
    function._dynamo_marked_constant = True
    return function


@constant_when_compiled
def _runs_triton(op: str, implementation: str | None, device: str, foreign: str) -> bool:
    return _chosen(f"{op}: implementation", implementation, device, foreign)[0] == "triton"


def _chosen(name: str, implementation: str | None, device: str, foreign: str) -> tuple[str, str]:
    def against_triton() -> str:
        return why_not_triton(device) or (foreign and f"the kernels do not take {foreign}")

    implementation = asked() if implementation is None else implementation
    candidates = {"triton": against_triton, "reference": runs}
    return choose(name, implementation, candidates, {"triton": "Triton kernels"})


@functools.cache
def why_not_triton(device: str) -> str:
    """Return why Triton kernels cannot run on tensors of this kind of device; "" if they can."""
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
