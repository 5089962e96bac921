"""Features of a network with random weights, which comes through the real loading path."""

import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch_fidelity import feature_extractor_inceptionv3 as port

from repa_fast import encoders
from repa_fast.distributed import World
from repa_fast.eval import inception
from repa_fast.eval.inception import Inception, mean_patch_tokens, spatial_features
from repa_fast.eval.spaces import ScoreConfig, feature_space
from tests.refusals import refused

pytestmark = pytest.mark.xdist_group("inception")  # the network is made once

FILE = "weights-inception-2015-12-05-6726825d.pth"


def pixels(count: int, height: int = 64, width: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """Random weights under which activations neither vanish nor explode, in the port's names."""
    with (
        mock.patch.object(port, "load_state_dict_from_url", return_value={}),
        mock.patch.object(port.FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        state = port.FeatureExtractorInceptionV3("inception", ["2048"]).state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if name.endswith(("running_var", "bn.weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.ndim > 1:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.1, generator=generator)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def network(inception_weights):
    """As `repa-fast eval` makes it."""
    config = ScoreConfig(inception_weights=str(inception_weights))
    space = feature_space(config, World(0, 1, torch.device("cpu")))
    assert (space.name, space.width) == ("inception", inception.POOL_WIDTH)
    return space.features


@pytest.fixture(scope="module")
def traced(network):
    """(inputs and outputs of some layers, features) of two images, 40 high and 64 wide."""
    seen = {}

    def keep(name):
        return lambda module, inputs, output: seen.update({name: (inputs[0].clone(), output)})

    with ExitStack() as hooks:
        for name in ("Conv2d_1a_3x3", "Mixed_6d", "Mixed_7c"):
            layer = network._module.get_submodule(name)
            hooks.enter_context(layer.register_forward_hook(keep(name)))
        return seen, network(pixels(2, 40, 64))


def test_features_have_their_widths_in_fp32(network, inception_weights, traced):
    _, features = traced
    assert inception.SPATIAL_WIDTH == 2023
    assert network._module.fc.weight.shape == (inception.CLASSES, inception.POOL_WIDTH)
    assert [tuple(f.shape) for f in features] == [(2, 2048), (2, 2023), (2, 1008)]
    for feature in features:
        assert feature.dtype == torch.float32 and not feature.requires_grad
        assert feature.isfinite().all() and not torch.equal(feature[0], feature[1])
    assert isinstance(network, Inception) and network.weights == inception_weights


def test_images_are_resized_as_by_tensorflow_1(traced):
    """Output pixel i lies at i * in / out of the input: neither centres nor corners are aligned."""
    images = pixels(2, 40, 64).double().numpy()
    for axis, size in ((2, 40), (3, 64)):
        position = np.arange(299) * (size / 299)
        low = np.floor(position).astype(int)
        high = np.minimum(low + 1, size - 1)
        share = (position - low).reshape((-1, 1) if axis == 2 else (-1,))
        images = images.take(low, axis) * (1 - share) + images.take(high, axis) * share
    expected = (images - 128) / 128
    got, _ = traced[0]["Conv2d_1a_3x3"]
    # positions near 299 * 64 / 299 are rounded to fp32, pixels differ by up to 255
    tolerance = 255 / 128 * 64 * torch.finfo(torch.float32).eps
    assert np.abs(got.double().numpy() - expected).max() <= 2 * tolerance


def test_pool_is_the_mean_over_the_last_block_and_logits_have_no_bias(network, traced):
    seen, features = traced
    _, output = seen["Mixed_7c"]
    assert torch.allclose(features.pool, output.mean((2, 3)), rtol=1e-5)
    layer = network._module.fc
    assert layer.bias.abs().max() > 0.1
    expected = features.pool.double() @ layer.weight.double().T
    assert torch.allclose(features.logits.double(), expected, atol=1e-4)


def test_spatial_features_are_of_the_1x1_branch_after_its_relu(traced):
    seen, features = traced
    _, block = seen["Mixed_6d"]
    branch = block[:, :7]  # it begins with that branch
    assert branch.min() == 0 < branch.max()
    assert torch.equal(features.spatial, branch.permute(0, 2, 3, 1).reshape(2, -1))


def test_spatial_features_are_in_the_order_of_tensorflow_in_any_memory_layout():
    height, width, channel = np.meshgrid(*map(np.arange, (17, 17, 7)), indexing="ij")
    tensorflow = 10_000 * height + 100 * width + channel
    others = np.full((17, 17, 185), -1)
    planes = np.concatenate([tensorflow, others], -1).transpose(2, 0, 1)
    got = spatial_features(torch.tensor(planes[None]))
    assert got.shape == (1, 2023)
    assert got[0].tolist() == tensorflow.ravel().tolist()
    assert got[0, [0, 1, 7, 17 * 7]].tolist() == [0, 1, 100, 10_000]
    activation = torch.randn(2, 192, 17, 17)
    last = activation.to(memory_format=torch.channels_last)
    assert torch.equal(spatial_features(last), spatial_features(activation))


def test_an_image_has_its_features_in_any_batch(network, traced):
    for whole, alone in zip(traced[1], network(pixels(2, 40, 64)[1:]), strict=True):
        assert torch.allclose(whole[1:], alone, rtol=1e-4, atol=1e-4)


def test_features_are_in_full_fp32_whatever_surrounds_them(network):
    images, inside = pixels(1), []

    def look(module, inputs):
        tf32 = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        inside.append((*tf32, torch.is_autocast_enabled("cpu")))

    expected = network(images)
    layers = network._module.Conv2d_1a_3x3, network._module.Mixed_7c
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(look))
        hooks.enter_context(torch.autocast("cpu", torch.bfloat16))
        got = network(images)
    assert inside == [(False, "highest", False)] * 2
    assert torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "high"
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize(
    "images",
    [torch.zeros(1, 3, 8, 8), pixels(1)[0], pixels(1).permute(0, 2, 3, 1), pixels(1)[:, :1]],
)
def test_other_images_are_refused(network, images):
    refused(lambda: network(images), r"expected uint8 \(B, 3, H, W\)")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """(what to do instead of a download) -> the file that is downloaded."""

    def replaced(download):
        monkeypatch.setattr(torch.hub, "download_url_to_file", download)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        return tmp_path / "checkpoints" / FILE

    return replaced


def test_weights_that_cannot_be_fetched_are_named(hub):
    def offline(*args, **kwargs):
        raise OSError("no route")

    words = str(hub(offline)), "no route", "--inception-weights", "v0.2.0"
    refused(Inception, *words, error=RuntimeError)


def test_weights_are_fetched_once_and_checked_by_their_hash(hub):
    asked = []

    def download(url, target, hash_prefix, progress):
        asked.append((url, hash_prefix))
        Path(target).write_bytes(b"not weights")

    file = hub(download)
    for _ in range(2):
        refused(Inception, f"--inception-weights: {file} is damaged, or neither")
    assert asked == [(port.URL_INCEPTION_V3, "6726825d")]


def test_without_torch_fidelity_the_remedy_is_named(monkeypatch, inception_weights):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    refused(lambda: Inception(inception_weights), "pip install 'repa-fast", error=RuntimeError)


class Code:
    def __reduce__(self):
        return (pytest.fail, ("pickled code was run",))


@pytest.mark.parametrize("content, message", [
    (None, "is not a file"),
    (b"not weights", "is damaged, or neither"),
    ({"code": Code()}, r"holds code: it names [\w.]+, expected tensors and plain values$"),
    ([torch.zeros(1)], "holds a list, expected a dictionary"),
    (dict.fromkeys("abcdefg", torch.zeros(1)), rf"has 7 tensors \(a.*\), expected .* {FILE}"),
    ({}, r"has 0 tensors \(none\)"),
])  # fmt: skip
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    refused(lambda: Inception(path), f"--inception-weights: .*file.pth {message}")


def test_an_encoders_features_are_the_mean_of_its_patch_tokens_in_fp32():
    encoder, images = encoders.load("digits-vit", 16, "cpu"), pixels(3, 16, 16)
    tokens = encoder(images)
    got = mean_patch_tokens(encoder, images)
    expected = tokens.double().sum(1) / tokens.shape[1]
    assert torch.allclose(got.double(), expected, atol=1e-6) and not got.requires_grad
    half = mean_patch_tokens(lambda images: tokens.bfloat16(), images)
    assert got.dtype == half.dtype == torch.float32
