"""What the parts of a run's config have in common."""

import typing
from typing import Literal

from repa_fast.contracts import expect_choice


class Part:
    """Flags of one subject. Each part checks its own, then the next one does, through super()."""

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            if typing.get_origin(hint) is Literal:
                expect_choice(name, getattr(self, name), typing.get_args(hint))


def expect_at_least(config: Part, lowest: int, *names: str) -> None:
    """Raise ValueError if a field is below `lowest`."""
    for name in names:
        if getattr(config, name) < lowest:
            raise ValueError(f"{name} is {getattr(config, name)}, expected at least {lowest}")
