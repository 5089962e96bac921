"""Weights in one call: `repa_fast.load`; and what is shared of them, a folder or on the hub."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from repa_fast.checkpoint.export import writing
from repa_fast.checkpoint.hub import CARD, REPOSITORY, SHARED, TRANSFORMER, WEIGHTS_FILE
from repa_fast.checkpoint.layout import newest_checkpoint, run_folder
from repa_fast.checkpoint.marker import trusted
from repa_fast.configs.sampler import SamplerConfig
from repa_fast.contracts import expect_writable
from repa_fast.distributed import own_device
from repa_fast.eval.load import Loaded, WeightsConfig
from repa_fast.eval.load import load as load_model
from repa_fast.eval.sample import numbered
from repa_fast.eval.sampling import ImageSampler
from repa_fast.failure import Failure
from repa_fast.share import card
from repa_fast.whole import expect_no_link, read_regular, whole_or_not
from repa_fast.words import first_line, short

if TYPE_CHECKING:
    from repa_fast.share.pipeline import SiTPipeline


@dataclass(frozen=True, kw_only=True)
class Pretrained(Loaded):
    """A model read from a file, with its dataset's metadata, its sampler, and ways to share it.

    Attributes:
        model: SiT or DiT, in eval mode, fp32, without gradients and projectors.
        metadata: of the dataset it was trained on: resolution, latents, class names.
        objective: what it predicts.
    """

    def sampler(self, **settings: Any) -> ImageSampler:
        """Return what draws images under settings, by the names of `SamplerConfig`.

        ValueError for settings that do not fit the model; Failure where latents need an autoencoder
        that cannot be loaded.
        """
        device = next(self.model.parameters()).device
        return ImageSampler(self, SamplerConfig(**settings), device)

    def sample(
        self, classes: Sequence[int | str] = (), *, count: int = 1, seed: int = 0, **settings: Any
    ) -> torch.Tensor:
        """Draw `count` images of each class: those that `repa-fast sample` draws by that seed.

        Args:
            classes: numbers, or names or parts of names; the first ten where empty.
            count: images of each class.
            seed: determines the noise, the same for every class.
            settings: as of `sampler`: num_steps, cfg_scale, mode and so on.

        Returns:
            uint8 (classes * count, 3, R, R), class after class, on the model's device.

        Raises:
            ValueError, Failure: as of `sampler`, or no such class.
        """
        index, labels = numbered(classes, count, self.metadata.class_names)
        return self.sampler(**settings).images(index, labels, seed)

    def pipeline(self) -> "SiTPipeline":
        """Return a pipeline of diffusers with copies of the weights."""
        try:
            from repa_fast.share.pipeline import SiTPipeline, SiTTransformer
        except ImportError as error:
            raise Failure(f"a pipeline needs diffusers (pip install diffusers): {error}") from error
        device = next(self.model.parameters()).device
        return SiTPipeline(SiTTransformer.of(self), self.objective.scheduler()).to(device)

    def save_pretrained(self, folder: str | Path, repository: str = "") -> Path:
        """Write what is shared into a new folder, and return it; whole or not at all.

        Weights in safetensors and what describes them, in diffusers' layout; a model card
        (README.md) and, of a run, its settings (training.yaml) and its newest grid of samples. The
        card's licence is left to be chosen, and owner/name too where no `repository` is given.
        ValueError if there is something already.
        """
        folder = Path(folder)
        expect_writable("out", folder, folder=True)
        with whole_or_not(folder) as partial:
            with writing(folder):
                self.pipeline().save_pretrained(partial)
            if grid := self._grid():
                (partial / card.SAMPLES).write_bytes(read_regular(grid))
            settings = card.training_settings(self)
            if settings:
                (partial / card.TRAINING).write_text(settings, "utf-8")
            text = card.model_card(self, repository or f"OWNER/{folder.name}", partial)
            (partial / CARD).write_text(text, "utf-8")
        return folder

    def _grid(self) -> Path | None:
        """Return the run's newest grid of samples if it is of these weights, and no link."""
        run = run_folder(self.source)
        grid = run / card.SAMPLES if run else None
        mine = grid and self.weights == "ema" and newest_checkpoint(run) == self.source
        return grid if mine and grid.is_file() and not grid.is_symlink() else None

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Upload what `save_pretrained` writes to owner/name; return its address, as `upload`."""
        expect_repository(repository)
        with tempfile.TemporaryDirectory() as made:
            folder = self.save_pretrained(Path(made) / "shared", repository)
            return upload(folder, repository, private=private)


def load(source: str | Path, device: torch.device | str = "cpu", **options: Any) -> Pretrained:
    """Load a model with its metadata and its sampler.

    Args:
        source: a run's folder, a checkpoint, an official .pt file, safetensors, a folder that
            `save_pretrained` wrote, or owner/name (or owner/name@revision) on the Hugging Face hub.
        device: where the model is.
        options: weights, origin, model, num_heads, prediction, as of `repa_fast.eval.load.load`.

    Raises:
        ValueError: there are no such weights, or they are not what the options say.
        Failure: a repository cannot be fetched.
    """
    return _pretrained(load_model(source, device, **options))


def _pretrained(loaded: Loaded) -> Pretrained:
    return Pretrained(**{field.name: getattr(loaded, field.name) for field in fields(Loaded)})


def upload(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload a shared folder's files to owner/name on the hub, which is made if it is not there.

    Only the files that a shared folder has. The token is that of `hf auth login` or HF_TOKEN.
    Returns the repository's address.

    Raises:
        ValueError: no name of a repository, no shared folder, or one with links.
        Failure: the hub does not take it; says why.
    """
    expect_repository(repository)
    if not (Path(folder) / TRANSFORMER / WEIGHTS_FILE).is_file():
        raise ValueError(f"{folder} is no shared folder, expected one that `repa-fast share` wrote")
    expect_no_link(*Path(folder).rglob("*"))  # which would upload what they lead to
    try:
        from huggingface_hub import HfApi

        api = HfApi()
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[*SHARED, card.TRAINING, card.SAMPLES],
            commit_message="Upload weights",
        )
    except Exception as error:  # of the hub's client, or of what it calls
        raise Failure(
            f"{folder} cannot be uploaded to {repository} ({type(error).__name__}: "
            f"{first_line(error)})"
        ) from error
    return str(made)


def expect_repository(repository: str) -> None:
    """Raise ValueError unless this is owner/name."""
    if not REPOSITORY.fullmatch(repository) or "@" in repository:
        raise ValueError(f"push_to is {short(repository)}, expected owner/name")


@dataclass(kw_only=True)
class ShareConfig(WeightsConfig):
    """Write weights as they are shared: a folder for diffusers, with a model card."""

    out: str = ""
    """Folder to write. Look at its README.md, and choose a licence there, before you upload it."""
    push_to: str = ""
    """owner/name of a repository on the Hugging Face hub, to upload OUT to, or CKPT itself where it
    is such a folder and no OUT is given."""
    private: bool = False
    """Make a new repository one that others do not see."""


def share(config: ShareConfig) -> str:
    """Write the folder and upload it, as far as either is asked for; return where it is."""
    if not (config.out or config.push_to):
        raise ValueError("out and push_to are empty, expected a folder to write, or owner/name")
    if config.push_to:
        expect_repository(config.push_to)
    folder = Path(config.out or config.ckpt)
    if config.out:
        expect_writable("out", folder, folder=True)
        loaded = _pretrained(config.load(own_device()))
        with trusted(not config.verify):
            loaded.save_pretrained(folder, config.push_to)
    if config.push_to:
        return upload(folder, config.push_to, private=config.private)
    return f"{folder} is written; choose a licence, and OWNER, in {folder / CARD}"
