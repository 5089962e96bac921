"""A function of one config dataclass as a command; what `cli` and `__main__` blocks use."""

import ast
import contextlib
import dataclasses
import inspect
import io
import os
import re
import signal
import sys
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from repa_fast.failure import Failure

READ_FROM_URLS = ("data_dir", "dataset", "path")
"""Fields of configs that may be URLs, where they are no pathlib.Path; the last is `info`'s."""


def main(call: Callable[[list[str]], Any], argv: Sequence[str]) -> int:
    """Call with the words after a command and return the exit status.

    What is returned is printed, once for all processes. A ValueError, which is how everything here
    refuses its input, ends in one line and status 2; a Failure or OSError in one and status 1.
    With `--debug` among the words the traceback is shown instead.
    """
    open_streams()
    expected = () if "--debug" in argv else (ValueError, Failure, OSError)
    for stream in (sys.stdout, sys.stderr):  # a locale may lack letters that names have
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        result = call([word for word in argv if word != "--debug"])
        if result is not None and os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(BrokenPipeError):  # `| head` has seen enough
                print(printable(str(result)), flush=True)
    except expected as error:
        text = str(error) if isinstance(error, Failure) else " ".join(str(error).split("\n"))
        print(f"repa-fast: {printable(text)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("repa-fast: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        flush_or_drop()
    return 0


def printable(text: str) -> str:
    """Return a text whose control characters, which could steer a terminal, are escaped."""
    kept = (c if c in "\n\t" or c.isprintable() else ascii(c)[1:-1] for c in text)
    return "".join(kept)


def open_streams() -> None:
    """Open /dev/null where standard streams are closed: the next file would take their place."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            stream = open(descriptor, "w" if descriptor else "r", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def flush_or_drop() -> None:
    """Write out what was printed; where nobody reads it (`| head`) or a disk is full, drop it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the interpreter would try again at exit, and fail with it
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def parse(config: type, argv: Sequence[str], prog: str) -> Any:
    """Return the config of a command line; exit with its help or what is wrong with it.

    `--class` stands for `--classes`: the former is a word of Python's and no field's name.
    ValueError for a URL in a field that is no dataset to be read.
    """
    import tyro

    from repa_fast.contracts import expect_path

    if "classes" in {field.name for field in dataclasses.fields(config)}:
        argv = [re.sub(r"^--class(?==|$)", "--classes", word) for word in argv]
    parsed = tyro.cli(mirror(config), args=argv, prog=prog, description=config.__doc__)
    for name, value in vars(parsed).items():
        if isinstance(value, Path) or (isinstance(value, str) and name not in READ_FROM_URLS):
            expect_path(name, value)
    return config(**vars(parsed))


def flags(values: Mapping[str, object], default: Mapping[str, object]) -> list[str]:
    """Return the words that make `values`, by the names of fields, of a command's defaults."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flag = f"--{flag}" if value else f"--no-{flag}"
        else:
            flag = f"--{flag}={value}"
        words += [flag] if value != default[name] else []
    return words


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
