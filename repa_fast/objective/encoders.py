"""REPA: hidden states are aligned with the tokens of frozen encoders (arXiv 2410.06940)."""

import copy
import os
from functools import partial

import torch

from repa_fast import encoders
from repa_fast.diffusion.alignment import cosine_losses, nt_xent
from repa_fast.models.flops import projector_flops
from repa_fast.models.projector import spatial_normalize
from repa_fast.objective.base import Alignment


class Encoders(Alignment):
    """A projector for each encoder, whose tokens come from the images or from the dataset."""

    name = "repa"
    paper = "REPA, 2410.06940"
    losses_known = ("cos", "nt-xent")
    encoders_default = "dinov2-vit-b"
    title = "the frozen encoders"

    def __init__(self, config) -> None:
        super().__init__(config)
        self.specs = encoders.specs(config.enc_type)
        self.heads = [spec.name for spec in self.specs]

    def model_arguments(self):
        """Return also the widths of the encoders' tokens."""
        return super().model_arguments() | {"z_dims": [spec.width for spec in self.specs]}

    def expect_model(self, depth, tokens):
        """Raise ValueError unless every encoder has as many tokens as the transformer."""
        for spec in self.specs:
            found = spec.num_tokens(self.config.resolution)
            if found != tokens:
                raise ValueError(
                    f"encoder {spec.name} gives {found} tokens, expected {tokens} "
                    "(the transformer's, of which --patch-size has fewer or more)"
                )

    def flops(self, tokens, width):
        """Return those of the projectors, and of the encoders that run in training."""
        config = self.config
        sizes = {"tokens": tokens, "width": width, "projector_dim": config.projector_dim}
        of_heads = sum(projector_flops(**sizes, z_dim=spec.width) for spec in self.specs)
        frozen = [] if config.features else self.specs
        return of_heads, sum(spec.flops(config.resolution) for spec in frozen)

    def choose_features(self, columns):
        """Take the columns that the config names, one for each encoder; none if it names none.

        ValueError where there is no such column, or it holds others than that encoder's features.
        """
        config, names = self.config, self.config.feature_columns
        if names and len(names) != len(self.specs):
            raise ValueError(
                f"features has {len(names)} columns ({config.features}), expected "
                f"{len(self.specs)}, one for each encoder of enc_type {config.enc_type}"
            )
        for name, spec in zip(names, self.specs):
            if name not in columns:
                raise ValueError(
                    f"features is {name!r}, expected one of the dataset's columns: "
                    f"{', '.join(columns) or 'none'}; `repa-fast prepare features` adds one"
                )
            tokens = spec.num_tokens(config.resolution)
            columns[name].expect(spec.name, config.resolution, tokens, spec.width)
        self.features = [columns[name] for name in names]

    def load(self, world):
        """Load the encoders; the first process of a machine goes ahead and downloads."""
        if self.features:
            return
        config = self.config
        files = encoders.weight_files(config.enc_type, config.enc_weights)
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        if not first:
            world.barrier()
        self.encoders = {
            spec.name: encoders.load(spec.name, config.resolution, world.device, file)
            for spec, file in zip(self.specs, files)
        }
        if first:
            world.barrier()

    def hollow(self):
        """Return a copy whose encoders give zeros, in the shapes of their tokens."""

        def zeros(spec: encoders.EncoderSpec, images: torch.Tensor) -> torch.Tensor:
            shape = (len(images), spec.num_tokens(self.config.resolution), spec.width)
            return torch.zeros(shape, device=images.device)

        found = copy.copy(self)
        found.encoders = {name: partial(zeros, encoders.spec(name)) for name in self.encoders}
        return found

    def targets(self, batch, clean, draws, objective, teacher):
        """Return each encoder's tokens of the clean images, or the dataset's features."""
        online = [encoder(batch["image"]) for encoder in self.encoders.values()]
        return online + [column.unpack(batch) for column in self.features]

    def losses(self, projections, targets, world):
        """Return the negative cosine over features (REPA eq. 5), or NT-Xent."""
        config = self.config
        if config.spatial_norm:
            targets = [spatial_normalize(target) for target in targets]
        if config.loss_type == "cos":
            return cosine_losses(projections, targets)
        options = {"temperature": config.nt_xent_temperature, "negatives": config.nt_xent_negatives}
        pairs = zip(projections, targets, strict=True)
        return [nt_xent(*pair, **options, world=world) for pair in pairs]
