"""Training. The package can be called: `repa_fast.train(config)` is `repa_fast.train.run.train`.

A function beside it of the same name would hide it, or not, by what was imported first.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from repa_fast.configs.config import TrainConfig
    from repa_fast.configs.flags import Asked


class _Train(ModuleType):
    def __call__(self, asked: "Asked | TrainConfig") -> "Path":
        """Run a config to its end; return its folder. Raises as `repa_fast.train.run.train`."""
        from repa_fast.train.run import train

        return train(asked)


sys.modules[__name__].__class__ = _Train
