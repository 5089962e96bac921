"""Experiment trackers: TensorBoard and Weights & Biases."""

import secrets
from pathlib import Path
from typing import Protocol

import numpy as np

from repa_fast.configs.config import TrainConfig

WANDB_PROJECT = "REPA"


class Tracker(Protocol):
    """Takes numbers and uint8 (H, W, 3) pictures by step."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def image(self, step: int, name: str, pixels: np.ndarray) -> None: ...

    def close(self) -> None: ...


def open_tracker(config: TrainConfig, run: Path, start_step: int) -> Tracker | None:
    """The tracker `--report-to` names, or None; what it holds after `start_step` is superseded."""
    if config.report_to == "tensorboard":
        return TensorBoard(run / config.logging_dir, start_step)
    if config.report_to == "wandb":
        return WeightsAndBiases(config, run)
    return None


class TensorBoard:
    """Event files in `folder`."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project REPA, its id kept in the run's folder so that resuming goes on with it.

    WANDB_MODE=offline keeps everything in that folder.

    Raises:
        ValueError: the package wandb is not installed.
    """

    def __init__(self, config: TrainConfig, run: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "report_to is wandb, but the package is not installed: pip install wandb"
            ) from error
        stored = run / "wandb-id"
        if not stored.exists():
            stored.write_text(secrets.token_hex(4))
        self._image = wandb.Image
        self._run = wandb.init(
            project=WANDB_PROJECT,
            name=config.exp_name,
            id=stored.read_text(),
            resume="allow",
            dir=run,
            config=config.to_dict(),
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._run.log({name: self._image(pixels)}, step=step)

    def close(self) -> None:
        self._run.finish()
