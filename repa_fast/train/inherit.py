"""What a run that is resumed keeps of its own config, and what a command changes of it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from repa_fast.checkpoint.layout import read_settings
from repa_fast.configs.config import TrainConfig
from repa_fast.configs.file import OF_ONE_RUN
from repa_fast.configs.flags import FLAG, Asked
from repa_fast.data.store import is_url
from repa_fast.words import short

OF_ONE_START = (*OF_ONE_RUN, "output_dir", "init_origin", "verify", "dry_run")
"""What a command says anew whenever it starts or resumes a run."""
HEAD = ("flag", "the run's", "asked for", "")


def inherit(asked: Asked, source: Path) -> tuple[TrainConfig, list[str]]:
    """Return the config to resume a native checkpoint with, and lines about what was asked for.

    What flags say is changed, and all else is as the run had it, whatever a file or a preset says:
    that is listed as kept. What a run cannot change is refused where the checkpoint is loaded.

    ValueError if the checkpoint's settings cannot be read, or its dataset is at a URL that nobody
    here asks for: whoever wrote them would choose what is read there, with the user's credentials.
    """
    saved = read_settings(source).config
    now, run = asked.config.to_dict(), saved.to_dict()
    names = [name for name in now if name not in OF_ONE_START]
    taken = {n: now[n] if asked.by.get(n) == FLAG else run[n] for n in names}
    if is_url(taken["data_dir"]) and taken["data_dir"] != now["data_dir"]:
        raise ValueError(
            f"the run's dataset is {short(run['data_dir'])}, expected --data-dir with that URL to "
            "open it"
        )
    rows = [
        (
            f"--{name.replace('_', '-')}",
            short(run[name]),
            f"{short(now[name])} ({asked.by[name]})",
            "changed" if asked.by[name] == FLAG else "kept",
        )
        for name in names
        if name in asked.by and now[name] != run[name]
    ]
    return replace(asked.config, **taken), _table(rows)


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(HEAD, *rows)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in (HEAD, *rows))
    return ["flags that differ from the run's own; those given on the command line change:", *lines]
