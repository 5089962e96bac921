"""The released training step, from a folder with REPA's code: rung o of benchmarks/step/ladder.py.

Model and loss are that folder's own (models/sit.py, loss.py), which this project does not contain;
the step around them, its optimizer and its encoders are `Baseline`'s. It shows whether model and
loss of rung a are fair to them.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from benchmarks.step.baseline import Baseline
from repa_fast.data.loader import Batch
from repa_fast.diffusion.draws import Draws
from repa_fast.train.state import TrainState


class Official(Baseline):
    """A training step with the released model and loss.

    Args:
        state: whose weights and encoders it begins with.
        folder: of the released code.

    Raises:
        ValueError: the folder does not hold it.
    """

    def __init__(self, state: TrainState, folder: Path) -> None:
        self.folder = folder
        self.loss_function = load(folder, "loss.py").SILoss()
        super().__init__(state, tuned=False, compiled=False)
        self.model.train()

    def new_model(self, arguments: dict) -> nn.Module:
        """Its model, from the arguments of repa_fast.models.sit.SiT."""
        names = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads")
        names += ("encoder_depth", "num_classes", "class_dropout_prob", "z_dims", "projector_dim")
        return load(self.folder, "models/sit.py").SiT(
            **{name: arguments[name] for name in names},
            decoder_hidden_size=arguments["hidden_size"],
            use_cfg=True,
            fused_attn=True,
            qk_norm=False,
        )

    def drawn_losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean losses of velocity and alignment by its own loss, which draws for itself."""
        targets = self.targets(batch)
        clean = self.clean(batch, torch.randn_like(batch["moments"].chunk(2, dim=1)[0]))
        labels = {"y": batch["label"]}
        denoise, aligned = self.loss_function(self.single, clean, labels, zs=targets)
        return denoise.mean(), aligned.mean()

    def single(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Its model in the precision of training; fp32 results, as accelerate gives them."""
        with self.autocast(self.precision):
            prediction, projections = self.model(x, t, y)
        return prediction.float(), [projection.float() for projection in projections]

    def loss_of(self, batch: Batch, draws: Draws) -> float:
        """The loss of these draws, without a step."""
        plain, null = self.model, self.model.num_classes

        def without_dropout(x, t, y, drop):
            return plain.eval()(x, t, torch.where(drop, null, y))

        self.model = without_dropout
        try:
            return super().loss_of(batch, draws)
        finally:
            self.model = plain.train()


def load(folder: Path, name: str) -> ModuleType:
    """A file of the released code as a module of its own.

    Raises:
        ValueError: there is no such file.
    """
    file = folder / name
    if not file.is_file():
        raise ValueError(f"{folder} has no {name}, expected a folder with REPA's released code")
    spec = importlib.util.spec_from_file_location(f"released_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
