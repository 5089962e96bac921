"""One dataclass holds every choice of a training run. Flag names are REPA's where REPA has one."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from repa_fast import objective
from repa_fast.configs.align import AlignConfig
from repa_fast.configs.data import DataConfig
from repa_fast.configs.evaluate import EvaluateConfig
from repa_fast.configs.model import ModelConfig
from repa_fast.configs.objective import ObjectiveConfig
from repa_fast.configs.optim import OptimConfig
from repa_fast.configs.parallel import ParallelConfig
from repa_fast.configs.part import Part
from repa_fast.configs.precision import PrecisionConfig
from repa_fast.configs.run import RunConfig

PARTS: dict[str, type[Part]] = {
    "run": RunConfig,
    "data": DataConfig,
    "model": ModelConfig,
    "objective": ObjectiveConfig,
    "alignment": AlignConfig,
    "optimizer": OptimConfig,
    "precision": PrecisionConfig,
    "parallel": ParallelConfig,
    "evaluation": EvaluateConfig,
}
"""The parts in the order in which `--help` shows them."""


@dataclass(kw_only=True)
class TrainConfig(
    EvaluateConfig, ParallelConfig, PrecisionConfig, OptimConfig, AlignConfig, RunConfig
):
    """A training run. Batch size is global; steps are optimizer steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        objective.resolve(self)

    def to_dict(self) -> dict:
        """Return a plain dictionary, enough to rerun."""
        return dataclasses.asdict(self)


FOR_SPEED_ALONE = (
    *("gemm_epilogues", "encoder_stream", "compile_mode"),
    *("compute_copy", "joint_adaln"),
)
RETIRED: dict[str, Callable[[object], dict]] = {
    **dict.fromkeys(FOR_SPEED_ALONE, lambda _: {}),
    "vae_path": lambda path: {"vae": path},
    "rollback": lambda times: {"stop_on_spike": bool(times)},
    "cuda_graph": lambda asked: {"cuda_graph": {False: "off", True: "on"}.get(asked, asked)},
}
"""Flags of earlier versions' saved configs, and those whose values were others: {name: what stands
for its value now, nothing where it made no difference to results}."""
REFUSED: dict[str, str] = {}
"""Flags of earlier versions that cannot be honoured, and why."""


def in_force(values: dict) -> dict:
    """Return a saved config's values by the names of today.

    ValueError for a name that no version of ours knows, or a flag that cannot be honoured any more.
    """
    known, kept = {field.name for field in dataclasses.fields(TrainConfig)}, {}
    for name, value in values.items():
        if name in REFUSED:
            raise ValueError(f"a saved config has {name} {value!r}: {REFUSED[name]}")
        if name not in RETIRED and name not in known:
            raise ValueError(f"a saved config has {name}, which is unknown here")
        kept |= RETIRED[name](value) if name in RETIRED else {name: value}
    return kept


def from_saved(values: dict) -> TrainConfig:
    """Return the config that `to_dict` gave, of this version or an earlier one.

    ValueError as for `in_force`, or for a value that does not fit.
    """
    return TrainConfig(**in_force(values))
