"""The model card of weights that are shared: what they are, how they were trained, their scores."""

import dataclasses
import json
import re
import shlex
import typing
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from repa_fast import __version__, command
from repa_fast.checkpoint.layout import GENERATED, Settings, read_settings, run_folder
from repa_fast.configs import file
from repa_fast.configs.config import TrainConfig
from repa_fast.configs.part import fits
from repa_fast.data.dataset import Metadata
from repa_fast.data.latents import can_decode
from repa_fast.eval.generate import GenerateConfig
from repa_fast.eval.load import Loaded
from repa_fast.eval.metrics import EvalConfig
from repa_fast.eval.pictures import markdown
from repa_fast.eval.records import is_number, read_record
from repa_fast.eval.sample import class_index, class_names
from repa_fast.objective import build_alignment
from repa_fast.words import note, one_line, short, some

SAMPLES, TRAINING = "samples.png", "training.yaml"
"""In a run's folder its newest grid of samples; in a shared one the settings of its training."""
PRIVATE = (
    "data_dir", "output_dir", "logging_dir", "report_to", "enc_weights", "eval_weights",
    "eval_reference", "vae",
)  # fmt: skip
"""Settings of a training that are of the machine it ran on."""
PLACES = ("dataset", "reference", "enc_weights", "inception_weights")
"""Settings of generate and eval that may be paths, of which only the last part is told."""
UNTOLD = ("ckpt", "samples", "sample_dir", "out", "weights", "num_heads", "write_reference")
"""Of their settings, those that the card says otherwise, or that the weights decide."""
LONGEST = 60
"""Letters of a name that the card shows."""
CLASSES_SHOWN = 20
HEAD = """---
library_name: repa-fast
pipeline_tag: unconditional-image-generation
tags: [diffusion, class-conditional, image-generation, diffusers]
# Choose a licence: uncomment the next line, and change it to yours.
# license: mit
---
"""
AGAIN = f"""[{TRAINING}]({TRAINING}) has all settings that are not the defaults:

```
repa-fast train --config {TRAINING} --data-dir DATA --exp-name NAME
```"""
USE = """## Use

With the package repa-fast:

```python
import repa_fast

loaded = repa_fast.load("{repository}")
images = loaded.sample([{label}], count=4, num_steps=50)  # uint8 (4, 3, {side}, {side})
```

With diffusers, and repa-fast beside it:

```python
from repa_fast import SiTPipeline

pipeline = SiTPipeline.from_pretrained("{repository}")
image = pipeline([{label}], num_inference_steps=50, guidance_scale=1.5).images[0]
```
"""


def model_card(loaded: Loaded, repository: str, folder: Path) -> str:
    """Return the card of a model, in Markdown, for owner/name and a folder with the other files.

    What it says of training and scores is read in the folder of the run that the weights are from;
    of other weights it says what they are alone. Nothing in it is a path of this machine.
    """
    metadata, settings = public(loaded.metadata), settings_of(loaded)
    names = class_names(metadata.class_names)
    count = sum(parameter.numel() for parameter in loaded.model.parameters()) / 1e6
    pixels = "pixels" if can_decode(metadata) else f"latents of {shown(metadata.vae)}"
    what = (
        f"{loaded.objective.model.__name__} with {count:.1f} M parameters "
        f"({one_line(loaded.name)}) for images of {metadata.resolution}x{metadata.resolution} "
        f"pixels in {len(names)} class{'es' * (len(names) > 1)}, on {pixels}."
    )
    step = "" if loaded.step is None else f" of step {loaded.step:,}"
    what += f" Weights: {loaded.weights or 'one set'}{step}. Written by repa-fast {__version__}."
    picture = "![samples](samples.png)" if (folder / SAMPLES).is_file() else ""
    label = json.dumps(_first(names))
    address = one_line(repository)
    parts = [
        HEAD,
        f"# {address.rpartition('/')[2]}",
        what,
        picture,
        USE.format(repository=address, label=label, side=metadata.resolution),
        _training(settings) if settings else "",
        _figures(loaded, address),
        f"## Classes\n\n{some(map(shown, names), CLASSES_SHOWN)}.",
        _papers(loaded, settings),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def settings_of(loaded: Loaded) -> Settings | None:
    """Return what a native checkpoint says of its training; None of other weights."""
    return read_settings(loaded.source) if loaded.source.is_dir() else None


def training_settings(loaded: Loaded) -> str:
    """Return the settings of the training, for `train.py --config`; "" where they are not known."""
    settings = settings_of(loaded)
    if settings is None:
        return ""
    plain, left_out = TrainConfig().to_dict(), (*PRIVATE, *file.OF_ONE_RUN)
    differing = {
        name: value
        for name, value in settings.config.to_dict().items()
        if value != plain[name] and name not in left_out
    }
    return file.write(differing, "Settings of the training.") + "\n"


def _training(settings: Settings) -> str:
    config, counters = settings.config, settings.counters
    alignment = build_alignment(config)
    aligned, block = alignment.describe()
    rows = [
        ("objective", f"{config.objective}, prediction {config.prediction}"),
        ("aligned with", f"{aligned}, at block {block}" if alignment.heads else "nothing"),
        ("steps", f"{counters['step']:,}"),
        ("images per step", f"{config.images_per_step}"),
        ("learning rate", f"{config.learning_rate:g}"),
        ("EMA decay", str(config.ema_decay)),
        ("seed", f"{config.seed}"),
    ]
    return f"## Training\n\n{_table('setting', rows)}\n\n{AGAIN}"


def _first(names: Sequence[str]) -> int | str:
    """Return the first class as an example: by its first name where that is its alone."""
    name = names[0].split(",")[0]
    with suppress(ValueError):
        if len(name) <= LONGEST and class_index(name, names) == 0:
            return name
    return 0


def _figures(loaded: Loaded, repository: str) -> str:
    """Return the scores of images of just these weights, with the commands that make them."""
    run, texts = run_folder(loaded.source), []
    for path in sorted((run / GENERATED).glob("*.json")) if run else ():
        try:
            texts.append(_figure(path, loaded, repository))
        except (OSError, ValueError, OverflowError) as error:
            note(f"{path.name} is left out of the card: {one_line(error)}")
    return "\n\n".join(["## Figures", *filter(None, texts)]) if any(texts) else ""


def _figure(path: Path, loaded: Loaded, repository: str) -> str:
    """Return the scores in a file, and the commands; "" of another file, or of other weights."""
    values = read_record(path)
    scores, samples, settings = (
        values[name] if isinstance(values.get(name), dict) else {}
        for name in ("scores", "samples", "settings")
    )
    images = path.with_name(Path(str(samples.get("name")).partition(",")[0]).name)
    beside = images.with_suffix(".json")
    made = read_record(beside) if scores and beside.is_file() and beside != path else {}
    if (made.get("step"), made.get("digest")) != (loaded.step, loaded.digest):
        return ""
    for name in ("path_type", "prediction"):
        if made.get(name) == getattr(loaded.objective, name):
            del made[name]
    made |= {"num_fid_samples": samples.get("count")}
    rows = [(shown(name), f"{v:.5g}") for name, v in scores.items() if is_number(v)]
    generate = ["generate", "--ckpt", repository, "--sample-dir", "samples"]
    evaluate = ["eval", "--samples", f"samples/{images.name}"]
    commands = [
        shlex.join(["repa-fast", *generate, *_flags(GenerateConfig, made)]),
        shlex.join(["repa-fast", *evaluate, *_flags(EvalConfig, settings)]),
    ]
    return "\n".join([_table("score", rows), "", "```", *commands, "```"])


def _table(head: str, rows: list[tuple[str, str]]) -> str:
    return "\n".join(markdown((head, "value"), rows))


def _flags(config: type, given: dict) -> list[str]:
    """Return the flags of a command for those settings that are not its defaults.

    ValueError for one that is not of the flag's kind: a record may be a stranger's.
    """
    hints = typing.get_type_hints(config)
    known = {field.name: field.default for field in dataclasses.fields(config)}
    told = {name: given[name] for name in known if name in given and name not in UNTOLD}
    for name, value in told.items():
        if not fits(value, hints[name]):
            raise ValueError(f"{name} is {short(value)}, which is no value of that flag")
    told |= {name: Path(told[name]).name for name in PLACES if told.get(name)}
    if told.get("vae") == "none":  # which is no flag's value: the latents are pixels
        del told["vae"]
    elif told.get("vae"):
        told["vae"] = _public(told["vae"])
    return [one_line(word) for word in command.flags(told, known)]


def public(metadata: Metadata) -> Metadata:
    """Return the metadata with the last part alone of an autoencoder that is a folder's path."""
    return dataclasses.replace(metadata, vae=_public(metadata.vae))


def _public(vae: str) -> str:
    """Return an autoencoder's name, or owner/name; of a folder the last part, never "none"."""
    named = re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", vae)
    if named and not Path(vae).is_dir():
        return vae
    last = re.split(r"[/\\]", vae.rstrip("/\\"))[-1]
    return last if re.fullmatch(r"[\w-][\w.-]*", last) and last != "none" else "unnamed"


def shown(name: object) -> str:
    """Return a name that may be a stranger's as Markdown that shows it as it is, cut off."""
    line = one_line(str(name)[:LONGEST])
    return re.sub(r"([\\`*_{}\[\]()<>#!|~&])", r"\\\1", line)


def _papers(loaded: Loaded, settings: Settings | None) -> str:
    """Return the papers of the objective, and of the alignment where something is aligned."""
    alignment = build_alignment(settings.config) if settings else None
    methods = [loaded.objective, *([alignment] if alignment and alignment.heads else [])]
    named = [method.paper.split(", ") for method in methods if method.paper]
    texts = [f"{name} (arXiv [{number}](https://arxiv.org/abs/{number}))" for name, number in named]
    return f"## Papers\n\n{' and '.join(texts)}." if texts else ""
