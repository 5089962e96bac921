"""The last metrics and the scores in a run's folder, whose files may be a stranger's."""

import os
from collections.abc import Callable
from pathlib import Path

from repa_fast.checkpoint.layout import GENERATED
from repa_fast.whole import open_regular, parse_json
from repa_fast.words import one_line, rate, short

SWEEP = "sweep.json"
"""Of a run's folder of generated images: the points of a sweep."""
MOST_BYTES = 2**20
"""Of a file; of a file of lines its end is read, which is no longer either."""
FILES_READ, VALUES_SHOWN, LETTERS_SHOWN, NAME_SHOWN = 100, 20, 60, 100


def describe_records(run: Path) -> list[str]:
    """Return a line for each record of a run that is there, or for what is wrong with it."""
    sweep = run / GENERATED / SWEEP
    generated = sorted({*sweep.parent.glob("*.json")} - {sweep})
    found = [
        _described(run / "metrics.jsonl", _metrics),
        _described(run / "evals.jsonl", _evaluation),
        _described(run / "scores.json", lambda path: f"{path.name}: {_listed(read_record(path))}"),
        _described(sweep, _sweep),
        *(_described(path, _scores) for path in generated[:FILES_READ]),
    ]
    if len(generated) > FILES_READ:
        found.append(f"{GENERATED}: {len(generated) - FILES_READ} more files")
    return [one_line(line) for line in found if line]


def _described(path: Path, describe: Callable[[Path], str]) -> str:
    try:
        return describe(path)
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        return f"{path.name} is left out: {error}"


def _metrics(path: Path) -> str:
    last = _last_line(path)
    if not last:
        return ""
    speed = last.get("images_per_second")
    known = is_number(speed) and abs(speed) < 1e12
    loss = _number(last["loss"]) if is_number(last.get("loss")) else "-"
    text = f"metrics at step {short(last.get('step'))}: loss {loss}"
    return f"{text}, {rate(speed)}" if known else text


def _evaluation(path: Path) -> str:
    last = _last_line(path)
    if not last:
        return ""
    step = f"evaluation at step {short(last.pop('step', None))}"
    if "failed" in last:
        return f"{step} failed: {short(last['failed'])}"
    return f"{step}: {_listed(last)}"


def _sweep(path: Path) -> str:
    """Return the range of each score over the points of a sweep."""
    points = read_record(path).get("points")
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        raise ValueError(f"points are {short(points)}, expected scores by name")
    values: dict[str, list] = {}
    for point in points:
        for name, value in point.items():
            if is_number(value):
                values.setdefault(name, []).append(value)
    ranges = {n: (min(of), max(of)) for n, of in list(values.items())[:VALUES_SHOWN]}
    texts = (
        f"{_cut(name)} {_number(low)}" + (f" to {_number(high)}" if low != high else "")
        for name, (low, high) in ranges.items()
    )
    return f"{GENERATED}/{path.name}: {', '.join([f'{len(points)} points', *texts])}"


def _scores(path: Path) -> str:
    """Return the scores that `repa-fast eval` wrote; nothing of another file."""
    values = read_record(path)
    if "scores" not in values:
        return ""
    if not isinstance(values["scores"], dict):
        raise ValueError(f"scores are {short(values['scores'])}, expected numbers by name")
    samples = values.get("samples")
    count = samples.get("count") if isinstance(samples, dict) else None
    name, scores = one_line(path.name)[:NAME_SHOWN], values["scores"] | {"samples": count}
    return f"{GENERATED}/{name}: {_listed(scores)}"


def read_record(path: Path) -> dict:
    """Return the values in a small file of JSON; ValueError if it is none."""
    with open_regular(path) as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES} bytes, expected a record of scores")
    return _values(data)


def _last_line(path: Path) -> dict:
    """Return the last line, or the one before where a crash cut it off; {} of an empty file."""
    with open_regular(path) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - MOST_BYTES))
        lines = file.read(MOST_BYTES).splitlines()
    try:
        return _values(lines[-1]) if lines else {}
    except ValueError:
        if len(lines) < 2:
            raise
        return _values(lines[-2])


def _values(data: bytes) -> dict:
    values = parse_json(data, "it")
    if not isinstance(values, dict):
        raise ValueError(f"it holds {short(values)}, expected values by name")
    return values


def _listed(values: dict) -> str:
    numbers = {name: value for name, value in values.items() if is_number(value)}
    shown = [f"{_cut(name)} {_number(value)}" for name, value in numbers.items()][:VALUES_SHOWN]
    return ", ".join(shown + ["..."] * (len(numbers) > VALUES_SHOWN))


def is_number(value: object) -> bool:
    """Return whether a value of JSON is a number."""
    return type(value) in (int, float)


def _number(value: float) -> str:
    return f"{value:.4g}" if type(value) is float else short(value)


def _cut(text: object) -> str:
    return one_line(text)[:LETTERS_SHOWN]
