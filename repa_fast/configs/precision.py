"""What a step computes in, and with which kernels."""

from dataclasses import dataclass
from typing import Literal

from repa_fast.configs.part import Part


@dataclass(kw_only=True)
class PrecisionConfig(Part):
    """What a step computes in, and with which kernels."""

    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """auto is bf16 on CUDA and fp32 (no) on CPU."""
    allow_tf32: bool = False
    """TF32 matmuls for fp32 tensors on CUDA."""
    residual_dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the residual stream while training; bf16 halves its traffic and rounds every addition."""
    compile: bool = False
    """torch.compile the blocks (fullgraph), up to four as one where they are whole."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Replay the training step as one CUDA graph. auto: on CUDA, in one process; on: also in
    several, with ddp."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """Triton kernels or plain torch; auto asks REPA_FAST_KERNELS, then takes Triton on CUDA."""
    attention: str = "auto"
    """Attention backend; auto times those whose gradients are right, and takes the fastest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.residual_dtype == "bf16" and self.mixed_precision not in ("auto", "bf16"):
            raise ValueError(
                f"residual_dtype is 'bf16' with mixed_precision {self.mixed_precision!r}, expected "
                "bf16"
            )
