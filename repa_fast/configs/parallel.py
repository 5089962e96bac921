"""How a run is spread over processes."""

from dataclasses import dataclass
from typing import Literal

from repa_fast.configs.part import Part


@dataclass(kw_only=True)
class ParallelConfig(Part):
    """Several processes, and memory."""

    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """Several processes: a copy of weights and optimizer state on each (ddp), one sharded over all
    (fsdp), or one on each node, sharded over its processes (hsdp)."""
    shard_size: int = 0
    """hsdp: processes that share a copy; 0 is a node's."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which gradients are averaged over processes."""
    reshard_after_forward: bool = False
    """fsdp and hsdp: drop gathered weights after a block's forward pass and gather them again for
    its backward pass; less memory, more communication."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Compute again in the backward pass: nothing, what is cheap (all but linear layers and
    attention), or whole blocks."""
    shard_encoder: bool = False
    """fsdp and hsdp: shard the frozen encoders too, for those of ViT-g or ViT-H size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard_size < 0 or (self.shard_size and self.parallel != "hsdp"):
            raise ValueError(
                f"shard_size is {self.shard_size} with parallel {self.parallel!r}, expected 0, or "
                "a number of processes with hsdp"
            )
        for name in ("reshard_after_forward", "shard_encoder"):
            if getattr(self, name) and self.parallel == "ddp":
                raise ValueError(f"{name} is set, which needs --parallel fsdp or hsdp")
