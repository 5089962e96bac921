"""Weights as they are shared: a folder of diffusers' layout, here or on the Hugging Face hub.

FOLDER/transformer/config.json                             what `SiTTransformer` is made of
FOLDER/transformer/diffusion_pytorch_model.safetensors     one set of weights
FOLDER/model_index.json, scheduler/                        for diffusers (repa_fast.share.pipeline)
FOLDER/README.md                                           the model card
"""

import re
from pathlib import Path

from repa_fast.failure import Failure
from repa_fast.words import first_line, note

TRANSFORMER = "transformer"
CONFIG, CARD = "config.json", "README.md"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
SHARED = (f"{TRANSFORMER}/*", "scheduler/*", "vae/*", "model_index.json", CARD)
"""Of a repository on the hub, what is fetched."""
REPOSITORY = re.compile(r"([\w.-]+)/[\w.-]+(@[\w./-]+)?")
"""owner/name or owner/name@revision."""


def find(source: str | Path) -> Path:
    """Return the path of weights: `source` itself, or a copy of a repository on the hub.

    What is there is taken as a path. Otherwise owner/name, or owner/name@revision, is fetched into
    the hub's cache, unless there is a folder `owner`, in which `name` is then missing. In a shared
    folder the path is that of the weights.

    Raises:
        ValueError: no such path, and no name of a repository.
        Failure: the repository cannot be fetched, or holds no weights as they are shared.
    """
    path, name = Path(source), str(source)
    if path.exists():
        return weights_in(path) or path
    named = REPOSITORY.fullmatch(name)
    if not named or Path(named[1]).exists():
        raise ValueError(
            f"{source} does not exist, expected a run, a checkpoint, a weight file, or owner/name "
            "of a repository on the Hugging Face hub"
        )
    found = weights_in(_fetch(name))
    if found is None:
        raise Failure(
            f"{name} on the hub has no {TRANSFORMER}/{WEIGHTS_FILE}, expected weights as "
            "`repa-fast share` writes them"
        )
    return found


def find_shared(source: str | Path, revision: str | None = None) -> Path:
    """Return the weights of a shared folder, or of a repository; ValueError for other weights."""
    found = find(f"{source}@{revision}" if revision else source)
    if found.name != WEIGHTS_FILE:
        raise ValueError(f"{source} is no shared folder, expected one that `repa-fast share` wrote")
    return found


def weights_in(folder: Path) -> Path | None:
    """Return the weights in a shared folder, or in its transformer/; None of any other path."""
    places = (folder / TRANSFORMER / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    return next((place for place in places if place.is_file()), None)


def _fetch(name: str) -> Path:
    repository, _, revision = name.partition("@")
    note(f"{name} does not exist here: asking the Hugging Face hub")
    try:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=[*SHARED])
        )
    except Exception as error:  # of the hub's client, or of what it calls
        raise Failure(
            f"{name} does not exist here, and cannot be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
