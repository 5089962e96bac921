"""Fast training of diffusion transformers with representation alignment.

What most programs need is here by name, and imported when it is first asked for.
"""

from importlib import import_module

TYPE_CHECKING = False  # typing's own takes longer to import than all the rest
if TYPE_CHECKING:
    from repa_fast import ops as ops
    from repa_fast.configs.config import TrainConfig as TrainConfig
    from repa_fast.models.dit import DiT as DiT
    from repa_fast.models.sit import SiT as SiT
    from repa_fast.share.pipeline import SiTPipeline as SiTPipeline
    from repa_fast.share.pretrained import Pretrained as Pretrained
    from repa_fast.share.pretrained import load as load

__version__ = "0.2.0"

_MODULES = {
    "DiT": "models.dit",
    "Pretrained": "share.pretrained",
    "SiT": "models.sit",
    "SiTPipeline": "share.pipeline",
    "TrainConfig": "configs.config",
    "load": "share.pretrained",
    "ops": "",
}
"""Public names, each with the module that it is taken from; "" for a module itself."""

__all__ = [  # tools read it as it stands
    "DiT",
    "Pretrained",
    "SiT",
    "SiTPipeline",
    "TrainConfig",
    "__version__",
    "load",
    "ops",
]


if not TYPE_CHECKING:  # to a type checker any name would be there

    def __getattr__(name: str) -> object:
        """Import a name of __all__ (PEP 562); AttributeError for any other."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = _MODULES[name]
        found = import_module(f"{__name__}.{module or name}")
        return getattr(found, name) if module else found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
