"""One launch of a Triton kernel as data: run it here, or compile it for a GPU that is not here."""

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
}

_traced = contextvars.ContextVar("traced", default=False)


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Make launches parts of the graph that torch.compile is tracing."""
    token = _traced.set(True)
    try:
        yield
    finally:
        _traced.reset(token)


@dataclass(frozen=True)
class Launch:
    """A kernel with everything its launch needs.

    Attributes:
        kernel: a @triton.jit function.
        grid: programs along x.
        arguments: run-time arguments by name: tensors, None, ints, and floats (annotated in the
            kernel's signature).
        constants: tl.constexpr arguments by name.
        warps: of 32 threads, per program.
    """

    kernel: Any
    grid: int
    arguments: dict[str, Tensor | int | float | None]
    constants: dict[str, Any]
    warps: int

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options; the default of enable_fp_fusion differs between Triton versions."""
        return {"num_warps": self.warps, "enable_fp_fusion": True}

    def run(self) -> None:
        """Launch on the current stream of the tensors' device; an empty grid does nothing."""
        if not self.grid:
            return
        if _traced.get():
            launcher = torch.library.wrap_triton(self.kernel)[(self.grid,)]
            launcher(**self.arguments, **self.constants, num_warps=self.warps)
            return
        device = next(a.device for a in self.arguments.values() if isinstance(a, Tensor))
        with torch.cuda.device(device if device.type == "cuda" else -1):
            self.kernel[(self.grid,)](**self.arguments, **self.constants, **self.options)

    def compile(self, capability: int) -> Any:
        """Compile for compute capability `capability` (90 for 9.0), without a GPU.

        Arguments are specialised as a launch would: pointers and integers that are multiples of 16
        are declared so, which is what makes 16-byte accesses possible; an integer 1 is a constant.
        """
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, attributes = {}, {}, {}
        for position, parameter in enumerate(self.kernel.params):
            name = parameter.name
            value = self.constants.get(name, self.arguments.get(name))
            constant = name in self.constants or value is None or (_is_int(value) and value == 1)
            signature[name] = "constexpr" if constant else _type(parameter, value)
            if constant:
                constants[name] = value
            elif isinstance(value, Tensor) or (_is_int(value) and value % 16 == 0):
                attributes[(position,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        target = GPUTarget("cuda", capability, 32)
        return triton.compile(source, target=target, options=self.options)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _type(parameter: Any, value: Tensor | float) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if parameter.annotation_type:
        return parameter.annotation_type
    if not _is_int(value):
        raise TypeError(f"{parameter.name} is {value!r}: floats need an annotation in the kernel")
    return "i32" if -(2**31) <= value < 2**31 else "i64"
