"""A function of one config dataclass as a command; what `cli` and `__main__` blocks use."""

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal


def main(call: Callable[[], Any]) -> int:
    """Call, and print what is returned, once for all processes; return the exit status.

    A ValueError, which is how everything here refuses its input, ends in one line and status 2.
    """
    from repa_fast.distributed import rank_and_size

    try:
        result = call()
    except ValueError as error:
        print(f"repa-fast: {error}", file=sys.stderr)
        return 2
    if result is not None and rank_and_size()[0] == 0:
        print(result)
    return 0


def parse(config: type, argv: Sequence[str], prog: str) -> Any:
    """Return the config of a command line; exit with its help or what is wrong with it.

    `--class` stands for `--classes`: the former is a word of Python's and no field's name.
    """
    import tyro

    if "classes" in {field.name for field in dataclasses.fields(config)}:
        argv = [re.sub(r"^--class(?==|$)", "--classes", word) for word in argv]
    parsed = tyro.cli(mirror(config), args=argv, prog=prog, description=config.__doc__)
    return config(**vars(parsed))


def mirror(
    config: type,
    default: Any = None,
    names: Sequence[str] | None = None,
    choices: Mapping[str, tuple[str, ...]] | None = None,
) -> type:
    """Return a dataclass of a config's fields for tyro, without its checks.

    Args:
        config: a dataclass with docstrings under its fields, which become sentences of one line;
            a field with the metadata {"positional": True} has no flag.
        default: a config whose values, plain ones, are the defaults.
        names: the fields; all of them where None.
        choices: for fields that are strings, what they may be.
    """
    import tyro

    hints, texts = typing.get_type_hints(config, include_extras=True), sentences(config)
    specs = []
    for field in dataclasses.fields(config):
        name = field.name
        if names is not None and name not in names:
            continue
        hint = Literal[choices[name]] if choices and name in choices else hints[name]
        hint = Annotated[hint, tyro.conf.arg(help=texts.get(name, ""))]
        if field.metadata.get("positional"):
            hint = tyro.conf.Positional[hint]
        given = {"default": field.default, "default_factory": field.default_factory}
        if default is not None:
            given = {"default": getattr(default, name)}
        specs.append((name, hint, dataclasses.field(**given)))
    made = dataclasses.make_dataclass(config.__name__, specs, kw_only=True)
    made.__doc__ = config.__doc__
    return made


def sentences(config: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass and its bases, on one line."""
    found = {}
    for kind in reversed(config.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
        for field, text in zip(body, body[1:]):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(text.value.value.split())
    return found
