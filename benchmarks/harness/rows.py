"""Rows of results, one JSON object a line, and the Markdown that reports and pages make of them."""

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

STAMP = ("date", "commit", "python", "torch", "device", "cores")
"""What reports say of where their rows are from."""
WITH_COMMAND = ("date", "commit", "command", *STAMP[2:])


def read(path: Path) -> list[dict]:
    """Return the rows of a file, none if it does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def append(path: Path, *rows: dict) -> None:
    """Append rows to a file, whose folder is made if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def latest(rows: Iterable[dict], key: Callable[[dict], Hashable]) -> list[dict]:
    """Return the last row of each key, keys in the order of their first rows."""
    return list({key(row): row for row in rows}.values())


def from_gpus(results: Path) -> list[dict]:
    """Return all rows that were measured on GPUs, oldest folder first."""
    paths = [
        p for p in sorted(results.glob("**/rows.jsonl")) if p.relative_to(results).parts[0] != "cpu"
    ]
    return [row for path in paths for row in read(path)]


def values(rows: Iterable[dict], name: str) -> str:
    """Return the values that rows have under a name, mostly one."""
    return ", ".join(dict.fromkeys(str(row[name]) for row in rows if name in row)) or "unknown"


def facts(rows: Sequence[dict], names: Iterable[str] = STAMP) -> list[str]:
    """Return a list item for each name, with its values."""
    return [f"- {name}: {values(rows, name)}" for name in names]


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share in percent, "unknown" for None."""
    return "unknown" if share is None else f"{100 * share:.{digits}f} %"


def grid(heads: Sequence, body: Iterable[Iterable], rule: str = "---") -> list[str]:
    """Return a Markdown table and an empty line."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (heads, *body)]
    head, *lines = (f"| {' | '.join(row)} |" for row in cells)
    return [head, "|" + f"{rule}|" * len(heads), *lines, ""]


def marks(name: str) -> tuple[str, str]:
    """Return the lines of a page between which a command writes."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def filled(page: str, name: str, text: str) -> str:
    """Return a page with `text` between the marks of `name`."""
    begin, end = marks(name)
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def is_current(path: Path, old: str, new: str) -> bool:
    """Say whether a page is what a command would write."""
    print(f"{path} is {'current' if old == new else 'not what this command would write'}")
    return old == new
