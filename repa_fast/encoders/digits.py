"""Two tiny frozen ViTs for the digits data set: a teacher for alignment and a judge for evaluation.

They stand in for DINOv2 and Inception where nothing can be downloaded: `DigitsViT` learned without
labels, `DigitsJudge` with labels, so that the judge is not the network that was aligned with.
`repa_fast.prepare.digits_encoders` makes both weight files.

Shapes: B batch, N = 16 tokens (4x4 patches of 4x4 pixels, row-major), D = 96 width.
"""

from __future__ import annotations

from importlib import resources

import torch
from torch import Tensor, nn

RESOLUTION = 16
PATCH_SIZE = 4
WIDTH = 96
NUM_CLASSES = 10
PIXEL_MEAN, PIXEL_STD = 0.30, 0.37  # pixels in [0, 1]; about those of the train split (0.31, 0.35)


def build_vit(num_classes: int) -> nn.Module:
    """Return the architecture both nets share, randomly initialised (timm VisionTransformer).

    Args:
        num_classes: outputs of the linear head; 0 for none.

    Returns:
        A module whose `forward_features` maps float (B, 3, 16, 16), normalised, to the patch tokens
        after the final norm, float (B, 16, 96), and whose `head` acts on their mean.
    """
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=RESOLUTION,
        patch_size=PATCH_SIZE,
        num_classes=num_classes,
        embed_dim=WIDTH,
        depth=4,
        num_heads=4,
        mlp_ratio=3.0,
        class_token=False,
        global_pool="avg",
        fc_norm=False,  # the final norm acts on the tokens, not on their mean
    )


def normalize(images: Tensor) -> Tensor:
    """Map pixels in 0..255 (any dtype, any shape) to float32 of about zero mean, unit std."""
    return (images.float() / 255 - PIXEL_MEAN) / PIXEL_STD


def _check_images(images: Tensor) -> None:
    expected = (3, RESOLUTION, RESOLUTION)
    if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise ValueError(
            f"images: expected uint8 (B, 3, {RESOLUTION}, {RESOLUTION}), "
            f"got {images.dtype} {tuple(images.shape)}"
        )


def _load_weights(vit: nn.Module, name: str) -> None:
    from safetensors.torch import load

    file = resources.files("repa_fast").joinpath("encoders", "weights", f"{name}.safetensors")
    vit.load_state_dict({key: value.float() for key, value in load(file.read_bytes()).items()})


class DigitsViT(nn.Module):
    """Self-supervised teacher whose patch tokens are alignment targets for 16x16 digits.

    Always frozen: eval mode, no gradients. Its tokens have zero mean over the train split.

    Args:
        pretrained: load the packaged weights (needs safetensors); else random initialisation.
    """

    name = "digits-vit"
    width = WIDTH

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__()
        self.vit = build_vit(num_classes=0)
        if pretrained:
            _load_weights(self.vit, self.name)
        self.eval().requires_grad_(False)

    def num_tokens(self, resolution: int) -> int:
        """Return the number of patch tokens for square images of `resolution` pixels a side.

        Raises:
            ValueError: if `resolution` is not 16.
        """
        if resolution != RESOLUTION:
            raise ValueError(f"resolution: expected {RESOLUTION}, got {resolution}")
        return (resolution // PATCH_SIZE) ** 2

    def forward(self, images: Tensor) -> Tensor:
        """Return patch tokens after the final norm.

        Args:
            images: uint8 (B, 3, 16, 16).

        Returns:
            float32 (B, 16, 96), tokens in row-major order.

        Raises:
            ValueError: if `images` has another dtype or shape.
        """
        _check_images(images)
        return self.vit.forward_features(normalize(images)).float()


class DigitsJudge(nn.Module):
    """Supervised classifier whose pooled features are the space Frechet distances are measured in.

    Always frozen: eval mode, no gradients.

    Args:
        pretrained: load the packaged weights (needs safetensors); else random initialisation.
    """

    name = "digits-judge"
    width = WIDTH

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__()
        self.vit = build_vit(num_classes=NUM_CLASSES)
        if pretrained:
            _load_weights(self.vit, self.name)
        self.eval().requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        """Return the mean of the patch tokens after the final norm.

        Args:
            images: uint8 (B, 3, 16, 16).

        Returns:
            float32 (B, 96).

        Raises:
            ValueError: if `images` has another dtype or shape.
        """
        _check_images(images)
        return self.vit.forward_features(normalize(images)).mean(dim=1).float()

    def forward(self, images: Tensor) -> Tensor:
        """Return class logits, float32 (B, 10), for uint8 (B, 3, 16, 16); errors as `features`."""
        return self.vit.head(self.features(images)).float()
