"""What this room shares: a tiny run, its model, and the images that it makes."""

import pytest
import torch

from repa_fast.eval.generate import GenerateConfig, generate
from repa_fast.eval.load import load
from tests.eval import checkpoints

COUNT, BATCH = 20, 8
"""Images that are made, in blocks of 8, 8 and 4."""


@pytest.fixture(autouse=True)
def same_precision():
    """Sampling chooses the precision of matrix products for the whole process; undo that."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run's folder with two checkpoints of different weights, of steps 3 and 7."""
    return checkpoints.run(tmp_path_factory.mktemp("run"), steps=(3, 7))


@pytest.fixture(scope="session")
def loaded(run):
    return load(run)


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    """A model of an autoencoder's latents, on another path than `loaded` and with QK norm."""
    changes = {"enc_type": "none", "patch_size": 2, "path_type": "cosine", "qk_norm": True}
    folder = tmp_path_factory.mktemp("latents")
    return load(checkpoints.run(folder, checkpoints.LATENTS, **changes))


@pytest.fixture(scope="session")
def make(run):
    """(folder, settings) -> the config to make the run's images there."""

    def config(folder, **settings) -> GenerateConfig:
        size = {"num_fid_samples": COUNT, "per_proc_batch_size": BATCH, "num_steps": 2}
        return GenerateConfig(**{"ckpt": str(run), "sample_dir": str(folder)} | size | settings)

    return config


@pytest.fixture(scope="session")
def whole(make, tmp_path_factory):
    """The file of images, made at once by one process."""
    return generate(make(tmp_path_factory.mktemp("whole")))
