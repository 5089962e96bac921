"""Features to evaluate images by: those of the Inception graph of 2015, or of any encoder.

The graph is TensorFlow's inception-2015-12-05, which FID, sFID and the inception score are defined
with, in the port of torch-fidelity: the same weights, TensorFlow 1's bilinear resize to 299 pixels
without half-pixel centres, (x - 128) / 128, and its poolings.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from repa_fast.encoders.files import Weights, load_safely, unwrap
from repa_fast.failure import Failure
from repa_fast.words import some

POOL_WIDTH = 2048
SPATIAL_CHANNELS = 7
SPATIAL_SIDE = 17
SPATIAL_WIDTH = SPATIAL_SIDE**2 * SPATIAL_CHANNELS
CLASSES = 1008
WEIGHTS_SHA256 = "6726825d"
"""The first digits of the SHA-256 of the published weights, as their file name has them."""


class Features(NamedTuple):
    """Features of B images, in fp32; networks other than the Inception have only `pool`.

    Attributes:
        pool: (B, 2048), TensorFlow's pool_3, for FID, KID, precision and recall.
        spatial: (B, 2023), see `spatial_features`, for sFID.
        logits: (B, 1008), pool times the classifier's weights. The bias is left out, as by the
            first program of the inception score and by ADM's evaluator.
    """

    pool: torch.Tensor
    spatial: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class Inception:
    """The frozen network. It computes in fp32, without TF32 or autocast, whatever surrounds it.

    Args:
        weights: file that torch-fidelity publishes; if empty, the one in torch's cache, which is
            fetched when it is not there.

    Raises:
        RuntimeError: torch-fidelity is not there, or the weights can be neither found nor fetched.
        ValueError: `weights` is not a file of these weights.
    """

    def __init__(self, weights: str | Path = "", device: torch.device | str = "cpu") -> None:
        if reason := why_not():
            raise Failure(reason)
        from torch_fidelity import feature_extractor_inceptionv3 as port

        self.weights = Path(weights) if weights else _fetch()
        self.device = torch.device(device)
        state, harmless = _read(self.weights), io.BytesIO()
        # The port unpickles what it is given, so it gets what was read without executing code.
        torch.save(state, harmless)
        harmless.seek(0)
        try:
            module = port.FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=harmless
            )
        except RuntimeError as error:
            raise ValueError(
                f"--inception-weights: {self.weights} has {len(state)} tensors "
                f"({some(sorted(state), 6) or 'none'}), expected those of "
                f"{Path(port.URL_INCEPTION_V3).name} of torch-fidelity"
            ) from error
        self._module = module.to(self.device)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        """Return the features of uint8 images (B, 3, H, W) of any size.

        Raises:
            ValueError: other images.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images are {images.dtype} {tuple(images.shape)}, expected uint8 (B, 3, H, W)"
            )
        spatial = []
        branch = self._module.Mixed_6d.branch1x1
        with (
            exact_fp32(self.device),
            branch.register_forward_hook(lambda _, __, out: spatial.append(spatial_features(out))),
        ):
            pool, logits = self._module(images.to(self.device))
        return Features(pool, *spatial, logits)


def spatial_features(activation: torch.Tensor) -> torch.Tensor:
    """Return sFID's features (B, 2023) of TensorFlow's mixed_6/conv, (B, C, 17, 17).

    They are its first 7 channels, flattened in TensorFlow's order (H, W, C), as in published
    reference files; flattening (C, H, W) gives a wrong distance to them without any error.

    The graph's blocks mixed to mixed_7 are torch's Mixed_5b to Mixed_6e, so mixed_6 is Mixed_6d.
    The last node of a scope conv is its ReLU, and the first conv of a 17x17 block is the 1x1 branch
    of 192 channels: the output of Mixed_6d.branch1x1 after batch norm and ReLU. torch-fidelity's
    converter of the weights pairs the names in the same way.
    """
    return activation[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


@torch.no_grad()
def mean_patch_tokens(
    encoder: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor
) -> torch.Tensor:
    """Return the mean of an encoder's patch tokens, fp32 (B, width), of uint8 images (B, 3, R, R).

    Distances in them are not the published FD-DINOv2 (arXiv 2306.04675), which takes the class
    token of DINOv2-L, nor CMMD (arXiv 2401.09603), which takes CLIP's image embedding.
    """
    return encoder(images).float().mean(1)


@contextmanager
def exact_fp32(device: torch.device) -> Iterator[None]:
    """Turn autocast off, and TF32, which has only 10 bits of mantissa; restores what was set."""
    matmuls, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmuls)
        torch.backends.cudnn.allow_tf32 = convolutions


def why_not() -> str:
    """Return why there are no Inception features here, with the package to install; else ""."""
    try:
        import torch_fidelity.feature_extractor_inceptionv3  # noqa: F401
    except ImportError as error:
        return (
            "the Inception features need torch-fidelity (pip install 'repa-fast[eval]'; "
            f"--features fitted needs no download): {error}"
        )
    return ""


def cached_weights() -> Path:
    """Return where torch's cache has the published weights, or will have them once fetched."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(_url()).name


def _url() -> str:
    from torch_fidelity import feature_extractor_inceptionv3 as port

    return port.URL_INCEPTION_V3


def _fetch() -> Path:
    """Return the published weights in torch's cache; fetch them if they are not there."""
    path, url = cached_weights(), _url()
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), WEIGHTS_SHA256, progress=False)
    except (OSError, RuntimeError) as error:
        release = url.split("/")[-2]
        raise Failure(
            f"the Inception weights are neither at {path} nor can they be fetched from {url} "
            f"({error}); take --features fitted, or --inception-weights FILE, where FILE is "
            f"{path.name} of torch-fidelity's release {release}"
        ) from error
    return path


def _read(path: Path) -> Weights:
    """Return the tensors in a file of torch.save, read without executing pickled code."""
    try:
        return unwrap(load_safely(path))
    except ValueError as error:
        raise ValueError(f"--inception-weights: {error}") from error
