"""What this room shares: a tiny run, its model, the images that it makes, and the digits."""

import functools

import pytest
import torch

from repa_fast.data.digits import prepare_digits
from repa_fast.eval.generate import generate
from repa_fast.eval.load import load
from tests.eval import checkpoints
from tests.eval.generating import config_of
from tests.eval.random_inception import write_random_inception


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
def make(run):
    """(folder, settings) -> the config to make the run's images there."""
    return functools.partial(config_of, run)


@pytest.fixture(scope="session")
def whole(make, tmp_path_factory):
    """The file of images, made at once by one process."""
    return generate(make(tmp_path_factory.mktemp("whole")))


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file of random weights of the Inception's."""
    return write_random_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The table of the digits."""
    return prepare_digits(tmp_path_factory.mktemp("data") / "digits")
