"""Config files: YAML that people write, or the args.json of a run."""

import json
import textwrap
import typing
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal

from repa_fast.command import sentences
from repa_fast.configs.config import TrainConfig, in_force
from repa_fast.whole import parse_json, read_regular
from repa_fast.words import nearest, one_line, short

ARGS = "args.json"
"""Of a run's folder: its resolved config."""
OF_ONE_RUN = ("exp_name", "resume", "resume_step", "skip_steps", "init_from")
"""What no run takes from a file or another run: its name, and where it begins."""
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NOTHING = dict.fromkeys(("", "null", "~"))
WIDTH = 98


def read(path: Path) -> dict[str, Any]:
    """Return the values in a YAML file or an args.json by their fields of TrainConfig.

    Those of OF_ONE_RUN are left out. A YAML file has a line `flag: value` for each, lists where a
    flag takes several, separated by commas.

    Raises:
        ValueError: it is no such file, has a name that no flag has, or a value of another kind.
    """
    if not path.exists():
        raise ValueError(f"--config {path} does not exist, expected a YAML file or an args.json")
    text = read_regular(path)
    try:
        values = parse_json(text, "it") if path.suffix == ".json" else _from_yaml(text)
        if not isinstance(values, dict):
            raise ValueError(f"it holds {short(values)}, expected flags and values")
        kept = in_force(values)
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from error
    return {name: value for name, value in kept.items() if name not in OF_ONE_RUN}


def write(settings: Mapping[str, object], about: str) -> str:
    """Return settings as a YAML file, what each means above it."""
    meaning, lines = sentences(TrainConfig), _comment(about)
    for name, value in settings.items():
        lines += ["", *_comment(meaning[name]), f"{name}: {json.dumps(value)}"]
    return "\n".join(lines)


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH)]


def _from_yaml(text: bytes) -> Any:
    """Return YAML's values as the flags' kinds: by itself it makes a text of 1e-4, false of no."""
    import yaml

    try:
        read = yaml.load(text, yaml.BaseLoader)  # scalars are texts
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"it is no YAML: {one_line(error)[:200]}") from error
    if not isinstance(read, dict):
        return read
    hints, values = typing.get_type_hints(TrainConfig), {}
    for name, value in read.items():
        name = str(name).replace("-", "_")
        if name not in hints:
            near = nearest(name, hints)
            hint = f"; did you mean {near}?" if near else ""
            raise ValueError(f"{short(name)} is no flag of train.py{hint}")
        several = isinstance(value, list) and all(isinstance(one, str) for one in value)
        values[name] = _typed(name, ",".join(value) if several else value, hints[name])
    return values


def _typed(name: str, text: object, hint: Any) -> object:
    """Return a text as the first kind of the hint that it fits; ValueError if it fits none."""
    union = typing.get_origin(hint) in (typing.Union, UnionType)
    kinds = typing.get_args(hint) if union else (hint,)
    for kind in sorted(kinds, key=lambda kind: kind is not NoneType):
        with suppress(KeyError, ValueError):
            if isinstance(text, str):
                return _as(kind, text)
    raise ValueError(f"{name} is {short(text)}, expected {getattr(hint, '__name__', hint)}")


def _as(kind: Any, text: str) -> object:
    """Return a text as another kind; KeyError or ValueError if it is none."""
    if kind is NoneType or kind is bool:
        return (NOTHING if kind is NoneType else BOOLEANS)[text.lower()]
    if typing.get_origin(kind) is Literal:
        return {word: word for word in typing.get_args(kind)}[text]
    return kind(text)
