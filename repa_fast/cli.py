"""`repa-fast COMMAND ...`; each command says what it takes with --help."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from repa_fast.configs import presets
from repa_fast.configs.config import TrainConfig
from repa_fast.data.dataset import Metadata
from repa_fast.data.open import open_dataset
from repa_fast.data.store import StoreError, is_url

SD_VAE_FACTOR = 8
"""Image pixels per latent pixel of the Stable Diffusion autoencoder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; user errors end in one line and exit status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "train": train,
        "prepare": prepare,
        "generate": generate,
        "sample": sample,
        "eval": evaluate,
        "probe": probe,
        "cknna": cknna,
        "pca": pca,
        "strip": strip,
        "sweep": sweep,
        "export": export,
        "info": info,
        "bench": bench,
        "presets": list_presets,
    }
    if not argv or argv[0] not in commands:
        print(f"usage: repa-fast {{{','.join(commands)}}} ... (--help after a command)")
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    try:
        commands[argv[0]](argv[1:])
    except ValueError as error:
        print(f"repa-fast: {error}", file=sys.stderr)
        return 2
    return 0


def train(argv: Sequence[str]) -> None:
    """Train with the flags of TrainConfig, over a preset's values."""
    config = parse_config(argv)
    if config.dry_run:
        print(describe(config))
        return
    from repa_fast.data.loader import DataTimeout
    from repa_fast.train.checkpoint import CheckpointFailed
    from repa_fast.train.loop import train as run
    from repa_fast.train.rollback import TrainingDiverged

    try:
        run(config)
    except (TrainingDiverged, CheckpointFailed, StoreError, OSError) as error:
        raise SystemExit(f"repa-fast: {error}") from error
    except DataTimeout as error:
        print(f"repa-fast: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # leaving as usual would join the threads that hang


def parse_config(argv: Sequence[str]) -> TrainConfig:
    """The config of `--preset NAME` (default: TrainConfig's own values) with flags over it."""
    import tyro

    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--preset")
    chosen, flags = chooser.parse_known_args(argv)
    default = presets.get(chosen.preset) if chosen.preset else TrainConfig()
    config = tyro.cli(
        TrainConfig,
        args=flags,
        default=default,
        prog="train.py",
        description=f"Train a SiT with REPA. --preset NAME, one of {', '.join(presets.PRESETS)}, "
        "sets the defaults below; flags win over it.",
    )
    if not config.exp_name:
        raise ValueError("exp_name is empty, expected --exp-name NAME (or a --preset)")
    return config


def prepare(argv: Sequence[str]) -> None:
    """Write a native dataset."""
    from repa_fast.prepare.images import (
        DIGITS_DIR,
        ImagesConfig,
        export_official,
        import_official,
        prepare_digits,
        prepare_images,
    )

    if argv[:1] == ["images"]:
        import tyro

        print(
            prepare_images(tyro.cli(ImagesConfig, prog="repa-fast prepare images", args=argv[1:]))
        )
        return
    if argv[:1] == ["features"]:
        import tyro

        from repa_fast.prepare.features import FeaturesConfig, prepare_features

        config = tyro.cli(FeaturesConfig, prog="repa-fast prepare features", args=argv[1:])
        print(prepare_features(config))
        return
    parser = argparse.ArgumentParser(prog="repa-fast prepare", description=prepare.__doc__)
    sources = parser.add_subparsers(dest="source", required=True)
    sources.add_parser("images", help="images and their latents; torchrun starts several processes")
    sources.add_parser("features", help="an encoder's features, added to a dataset as a column")
    bundled = sources.add_parser("digits", help="scikit-learn's bundled scans of digits")
    bundled.add_argument("--out", type=Path, default=DIGITS_DIR, help="folder to write")
    official = sources.add_parser("import-official", help="an images/ + vae-sd/ folder")
    official.add_argument("--data-dir", type=Path, required=True, help="the folder")
    official.add_argument("--out", type=Path, required=True, help="folder to write")
    official.add_argument("--no-images", action="store_true", help="leave the images out")
    export = sources.add_parser("export-official", help="a native dataset as such a folder")
    export.add_argument("--data-dir", type=Path, required=True, help="the dataset")
    export.add_argument("--out", type=Path, required=True, help="folder to write")
    export.add_argument("--split", default="train", help="train or val")
    arguments = parser.parse_args(argv)
    if arguments.source == "digits":
        print(prepare_digits(arguments.out))
    elif arguments.source == "export-official":
        print(export_official(arguments.data_dir, arguments.out, arguments.split))
    else:
        with_images = not arguments.no_images
        print(import_official(arguments.data_dir, arguments.out, with_images=with_images))


def export(argv: Sequence[str]) -> None:
    """Write a native checkpoint as a file that other programs read."""
    from repa_fast.checkpoint.export import FORMATS, file_beside, format_of
    from repa_fast.checkpoint.export import export as write
    from repa_fast.checkpoint.info import newest_checkpoint

    parser = argparse.ArgumentParser(prog="repa-fast export", description=export.__doc__)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint's directory, or a run's")
    parser.add_argument("--to", choices=FORMATS, help="default: by OUT's name, or official")
    parser.add_argument(
        "--out", type=Path, help="file to write: STEP.pt, step-STEP.pt (sra) or STEP.safetensors"
    )
    arguments = parser.parse_args(argv)
    source = newest_checkpoint(arguments.checkpoint)
    to = arguments.to or (format_of(arguments.out) if arguments.out else "official")
    out = arguments.out or file_beside(source, to)
    write(source, to, out)
    print(out)


def generate(argv: Sequence[str]) -> None:
    """Write many images of a checkpoint to one .npz."""
    import tyro

    from repa_fast.data.processes import rank_and_size
    from repa_fast.eval.generate import GenerateConfig
    from repa_fast.eval.generate import generate as run

    written = run(tyro.cli(GenerateConfig, prog="repa-fast generate", args=argv))
    if rank_and_size()[0] == 0:
        print(written)


def sample(argv: Sequence[str]) -> None:
    """Write a picture of a checkpoint's samples of a class."""
    import tyro

    from repa_fast.eval.sample import SampleConfig
    from repa_fast.eval.sample import sample as run

    print(run(tyro.cli(SampleConfig, prog="repa-fast sample", args=_with_classes(argv))))


def _with_classes(argv: Sequence[str]) -> list[str]:
    """--class as --classes: the former is a word of Python's and no field's name."""
    alone = ["--classes" if flag == "--class" else flag for flag in argv]
    return [flag.replace("--class=", "--classes=", 1) for flag in alone]


def evaluate(argv: Sequence[str]) -> None:
    """Compare generated images with real ones."""
    import tyro

    from repa_fast.eval.metrics import EvalConfig
    from repa_fast.eval.metrics import evaluate as run

    print(run(tyro.cli(EvalConfig, prog="repa-fast eval", args=argv)))


def probe(argv: Sequence[str]) -> None:
    """Linear probing of hidden states."""
    import tyro

    from repa_fast.analysis.probe import ProbeConfig
    from repa_fast.analysis.probe import probe as run

    print(run(tyro.cli(ProbeConfig, prog="repa-fast probe", args=argv)))


def cknna(argv: Sequence[str]) -> None:
    """Compare hidden states with encoders."""
    import tyro

    from repa_fast.analysis.similarity import SimilarityConfig, similarity

    print(similarity(tyro.cli(SimilarityConfig, prog="repa-fast cknna", args=argv)))


def pca(argv: Sequence[str]) -> None:
    """Hidden states as pictures."""
    import tyro

    from repa_fast.analysis.pca import PcaConfig
    from repa_fast.analysis.pca import pca as run

    print(run(tyro.cli(PcaConfig, prog="repa-fast pca", args=argv)))


def strip(argv: Sequence[str]) -> None:
    """The same noise through every checkpoint of a run."""
    import tyro

    from repa_fast.eval.strip import StripConfig
    from repa_fast.eval.strip import strip as run

    print(run(tyro.cli(StripConfig, prog="repa-fast strip", args=_with_classes(argv))))


def sweep(argv: Sequence[str]) -> None:
    """Scores against steps, guidance scales and intervals."""
    import tyro

    from repa_fast.eval.sweep import SweepConfig
    from repa_fast.eval.sweep import sweep as run

    print(run(tyro.cli(SweepConfig, prog="repa-fast sweep", args=argv)))


def info(argv: Sequence[str]) -> None:
    """Say what a checkpoint, a run, a weight file or a dataset is."""
    from repa_fast.checkpoint.info import describe_path

    parser = argparse.ArgumentParser(prog="repa-fast info", description=info.__doc__)
    parser.add_argument("path", help="a path, or the URL of a dataset")
    print(describe_path(parser.parse_args(argv).path))


def bench(argv: Sequence[str]) -> None:
    """Measure the training step; the benchmarks are in a checkout only."""
    try:
        from benchmarks.step.step import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("benchmarks", "benchmarks.step.step"):
            raise
        raise ValueError(
            "bench: no benchmarks here, expected `python -m repa_fast bench` in a checkout's root"
        ) from error
    run(argv)


def list_presets(argv: Sequence[str]) -> None:
    """List the presets as a table."""
    from rich.console import Console
    from rich.table import Table

    argparse.ArgumentParser(prog="repa-fast presets", description=list_presets.__doc__).parse_args(
        argv
    )
    table = Table("preset", "model", "aligned with", "at block", "to reach", "what it is")
    for name, preset in presets.PRESETS.items():
        config = preset()
        aligned, depth = "-", "-"
        if config.align == "sra":
            aligned, depth = "its average", f"{config.block_out_s} with {config.block_out_t}"
        elif config.enc_type != "none":
            aligned, depth = config.enc_type, str(config.encoder_depth)
        table.add_row(
            name,
            config.model if config.hidden_size is None else f"width {config.hidden_size}",
            aligned,
            depth,
            presets.TO_REACH.get(name, "-"),
            presets.describe(name),
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def describe(config: TrainConfig) -> str:
    """The resolved config, parameter counts, FLOPs per image and a memory estimate."""
    from repa_fast.data.processes import rank_and_size
    from repa_fast.train.memory import budget
    from repa_fast.train.parallel import shard_count

    shards = shard_count(config, rank_and_size()[1])
    shared = f" in each of {shards} processes" if shards > 1 else ""
    estimate = budget(config, expected_metadata(config), shards)
    activations = estimate.activation_bytes * (2 if config.mixed_precision == "no" else 1)
    batch = config.batch_size
    frozen = "SRA's teacher" if config.align == "sra" else "the frozen encoders"
    return "\n".join(
        [
            json.dumps(config.to_dict(), indent=2),
            f"parameters: {estimate.parameters / 1e6:.0f} M, "
            f"with projectors {estimate.parameters_with_projectors / 1e6:.0f} M",
            f"training FLOPs per image: {estimate.train_flops / 1e9:.1f} GFLOP "
            f"({estimate.encoder_flops / 1e9:.1f} of them {frozen})",
            f"memory, estimated: {estimate.state_bytes / 2**30:.1f} GiB of weights, gradients, "
            f"optimizer and average{shared}; {activations / 2**20:.0f} MiB of activations "
            f"per image ({batch * activations / 2**30:.1f} GiB at batch {batch} in "
            "one pass)",
        ]
    )


def expected_metadata(config: TrainConfig) -> Metadata:
    """The dataset's metadata; where it is not there yet, what the flags make of it."""
    from repa_fast.prepare.images import digits_metadata

    if config.data_dir == "digits":
        return digits_metadata()
    if is_url(config.data_dir) or Path(config.data_dir).exists():
        return open_dataset(config.data_dir).metadata
    side = config.resolution // SD_VAE_FACTOR
    return Metadata(
        resolution=config.resolution,
        latent_shape=(4, side, side),
        vae="sd-vae-ft-mse",
        scale=0.18215,
        bias=0.0,
        class_names=tuple(map(str, range(config.num_classes))),
    )
