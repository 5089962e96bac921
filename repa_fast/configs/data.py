"""The dataset and how it is read."""

from dataclasses import dataclass
from typing import Literal

from repa_fast.configs.part import Part, expect_at_least


@dataclass(kw_only=True)
class DataConfig(Part):
    """The dataset, and how its batches are read."""

    data_dir: str = "../data/imagenet256"
    """Dataset folder; `digits` stands for the bundled set, written to data/digits on first use."""
    resolution: int | None = None
    """Image resolution, to be checked; the dataset's."""
    batch_size: int = 256
    """Global batch size, over all processes; accumulation multiplies it."""
    gradient_accumulation_steps: int = 1
    """Batches per optimizer step, as upstream: the effective batch is this times BATCH_SIZE."""
    micro_batch: int | Literal["auto"] = "auto"
    """Images per forward pass of one process, or auto: the most that fit into memory."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """A row that cannot be read or does not fit: stop, or take the next good row and count it."""
    num_workers: int = 4
    """Threads that decode images."""
    decode: Literal["auto", "dali-gpu", "dali-cpu", "torch"] = "auto"
    """Who decodes images: DALI on the GPU, DALI on the CPU, or (torch) Pillow on the CPU; auto is
    dali-gpu on CUDA where DALI is installed, else torch."""
    seed: int = 0
    """Determines initial weights, sample order and all noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_at_least(self, 1, "resolution", "batch_size", "gradient_accumulation_steps")
        expect_at_least(self, 1, "num_workers")
        expect_at_least(self, 0, "seed")
        if self.micro_batch != "auto" and self.micro_batch < 1:
            raise ValueError(f"micro_batch is {self.micro_batch}, expected auto or at least 1")

    @property
    def images_per_step(self) -> int:
        """Images one optimizer step consumes, over all processes."""
        return self.batch_size * self.gradient_accumulation_steps
