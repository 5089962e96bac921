"""A run: its folder, what it writes and when, where it begins."""

from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from repa_fast.configs.part import Part, expect_at_least
from repa_fast.contracts import expect_path


@dataclass(kw_only=True)
class RunConfig(Part):
    """The run: its folder, what it writes and when, and where it begins."""

    output_dir: str = "exps"
    """Folder of all runs."""
    exp_name: str = ""
    """Name of this run; it lives in OUTPUT_DIR/EXP_NAME. The preset's name if empty."""
    logging_dir: str = "logs"
    """Inside the run: TensorBoard's files, each process's errors and its stacks when it hangs."""
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where metrics go beside metrics.jsonl."""
    log_every: int = 100
    """Read the metrics, which stay on the device between, every so many steps."""
    sampling_steps: int = 10_000
    """Write a sample grid every so many steps; 0 writes none."""
    checkpointing_steps: int = 50_000
    """Write a checkpoint every so many steps; one is always written at the end."""
    keep_last: int = 0
    """Keep only so many of the newest checkpoints; 0 keeps all."""
    keep_every: int = 0
    """With KEEP_LAST, also keep the checkpoints of every so many steps; 0 keeps no more."""
    resume: str = "never"
    """auto: resume from the newest whole checkpoint of the run, if there is one; or a step, a
    checkpoint, an official .pt file, or another run's folder."""
    resume_step: int = 0
    """Resume from the checkpoint of this step; 0 is none."""
    init_from: str = ""
    """Start a new run from the weights in this checkpoint or file."""
    init_origin: Literal["repa", "sit", "dit"] = "repa"
    """Whose weights INIT_FROM holds: REPA's or ours, or the original SiT's or DiT's."""
    verify: bool = True
    """Compare checksums of what the run resumes or begins from; otherwise read it as it is."""
    skip_steps: int = 0
    """Leave out the data of so many steps from where the run is resumed, as the message of a run
    that diverged says."""
    stop_on_spike: bool = False
    """Stop when the loss spikes, and say how to resume before the spike and past its data."""
    watchdog: float = 120.0
    """Write all stacks to LOGGING_DIR/stacks-rankK.txt when a step takes longer than so many
    seconds; 0 never."""
    collective_timeout: float = 1800.0
    """Seconds a process waits for the others before it fails."""
    data_timeout: float = 0.0
    """Seconds a step waits for its batch before it fails; 0 waits for ever."""
    dry_run: bool = False
    """Print the resolved config, parameter count, FLOPs and a memory estimate, and stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_path("output_dir", self.output_dir)
        for name, above in (("exp_name", "output_dir"), ("logging_dir", "the run's")):
            expect_path(name, getattr(self, name))
            inside = PurePath(getattr(self, name))
            if inside.is_absolute() or ".." in inside.parts:
                raise ValueError(f"{name} is {str(inside)!r}, expected a folder within {above}")
        expect_at_least(self, 1, "log_every", "checkpointing_steps")
        expect_at_least(self, 0, "resume_step", "keep_last", "keep_every", "skip_steps")
        expect_at_least(self, 0, "sampling_steps", "watchdog", "data_timeout")
        if self.stop_on_spike and self.keep_last == 1:
            raise ValueError(
                "keep_last is 1 with stop_on_spike, expected 0 or at least 2: a checkpoint is "
                "trusted once a good reading has followed it"
            )
        if self.collective_timeout <= 0:
            raise ValueError(
                f"collective_timeout is {self.collective_timeout}, expected more than 0 seconds"
            )
