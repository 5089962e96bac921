"""What a model learns: Objective (of noisy latents) and Alignment (of hidden states).

Every file of this folder is imported, so that a method is a file with a class in it.
"""

import importlib
import pkgutil

from repa_fast.configs.align import AlignConfig
from repa_fast.configs.objective import ObjectiveConfig
from repa_fast.contracts import expect_choice
from repa_fast.objective.base import Alignment, Objective

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")

OBJECTIVES = {kind.name: kind for kind in Objective.__subclasses__()}
ALIGNMENTS = {kind.name: kind for kind in Alignment.__subclasses__()}


def build_objective(config: ObjectiveConfig) -> Objective:
    """Return the objective that a config names; ValueError if other settings do not go with it."""
    expect_choice("objective", config.objective, tuple(OBJECTIVES))
    kind = OBJECTIVES[config.objective]
    kind.check(config)
    return kind(config)


def build_alignment(config: AlignConfig) -> Alignment:
    """Return the alignment that a config names, with nothing loaded."""
    return ALIGNMENTS[config.align](config)


def resolve(config: AlignConfig) -> None:
    """Set what follows from the alignment, and check what belongs to objective and alignment."""
    build_objective(config)
    expect_choice("align", config.align, tuple(ALIGNMENTS))
    kind = ALIGNMENTS[config.align]
    if config.enc_type is None:
        config.enc_type = kind.encoders_default
    kind.check(config)
    able = [name for name, one in ALIGNMENTS.items() if config.align_decay in one.decays_known]
    if able and config.align not in able:
        needed = " or ".join(able)
        raise ValueError(f"align_decay is {config.align_decay!r}, which needs --align {needed}")
    expect_choice("align_decay", config.align_decay, kind.decays_known)


def choices() -> dict[str, tuple[str, ...]]:
    """Return the values that flags of objective and alignment take, for `--help`."""
    known = ALIGNMENTS.values()
    return {
        "objective": tuple(OBJECTIVES),
        "align": tuple(ALIGNMENTS),
        "loss_type": tuple(dict.fromkeys(loss for kind in known for loss in kind.losses_known)),
        "align_decay": tuple(dict.fromkeys(one for kind in known for one in kind.decays_known)),
    }
