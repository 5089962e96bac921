"""What the parts of a run's config have in common."""

import typing
from types import NoneType, UnionType
from typing import Any, Literal, Union

from repa_fast.contracts import expect_choice
from repa_fast.words import short


class Part:
    """Flags of one subject. Each part checks its own, then the next one does, through super()."""

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if typing.get_origin(hint) is Literal:
                expect_choice(name, value, typing.get_args(hint))
            elif not fits(value, hint):
                kind = getattr(hint, "__name__", str(hint))
                raise ValueError(f"{name} is {short(value)}, expected {kind}")


def fits(value: object, hint: Any) -> bool:
    """Return whether a value is of a kind that a hint names; integers are numbers, NaN is none."""
    if typing.get_origin(hint) in (Union, UnionType):
        return any(fits(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return type(value) in (int, float) and value == value
    if hint in (int, str, bool, NoneType):
        return type(value) is hint
    return True


def expect_at_least(config: Part, lowest: int, *names: str) -> None:
    """Raise ValueError if a field is below `lowest`."""
    for name in names:
        if getattr(config, name) is not None and getattr(config, name) < lowest:
            raise ValueError(f"{name} is {getattr(config, name)}, expected at least {lowest}")
