"""Two tiny frozen ViTs for the digits: a teacher for alignment, and a classifier for evaluation.

They stand in for DINOv2 and Inception where nothing can be downloaded: `DigitsViT` learned without
labels, `DigitsJudge` with labels, so that evaluation is not by the network that was aligned with.
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

    Its `forward_features` maps float (B, 3, 16, 16), normalised, to the patch tokens after the
    final norm, float (B, 16, 96); its `head`, of `num_classes` outputs or none, acts on their mean.
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


class _DigitsNet(nn.Module):
    """A frozen net, with the packaged weights (needs safetensors) or randomly initialised."""

    name: str
    num_classes: int
    width = WIDTH

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__()
        self.vit = build_vit(self.num_classes)
        if pretrained:
            from safetensors.torch import load

            folder = resources.files("repa_fast") / "encoders" / "weights"
            state = load((folder / f"{self.name}.safetensors").read_bytes())
            self.vit.load_state_dict({key: value.float() for key, value in state.items()})
        self.eval().requires_grad_(False)

    def tokens(self, images: Tensor) -> Tensor:
        """Map uint8 (B, 3, 16, 16), or raise ValueError, to patch tokens after the final norm.

        They are (B, 16, 96), row-major.
        """
        if images.dtype != torch.uint8 or images.shape[1:] != (3, RESOLUTION, RESOLUTION):
            found, side = f"{images.dtype} {tuple(images.shape)}", RESOLUTION
            raise ValueError(f"images: expected uint8 (B, 3, {side}, {side}), got {found}")
        return self.vit.forward_features(normalize(images))


class DigitsViT(_DigitsNet):
    """Self-supervised teacher for 16x16 digits; its tokens' mean over the train split is zero."""

    name, num_classes = "digits-vit", 0

    def num_tokens(self, resolution: int) -> int:
        """Return the number of patch tokens of square images; ValueError for other than 16."""
        if resolution != RESOLUTION:
            raise ValueError(f"resolution: expected {RESOLUTION}, got {resolution}")
        return (resolution // PATCH_SIZE) ** 2

    def forward(self, images: Tensor) -> Tensor:
        """Return the patch tokens, float32 (B, 16, 96), of uint8 (B, 3, 16, 16); see `tokens`."""
        return self.tokens(images).float()


class DigitsJudge(_DigitsNet):
    """Supervised classifier whose pooled features are the space of Frechet distances."""

    name, num_classes = "digits-judge", NUM_CLASSES

    def features(self, images: Tensor) -> Tensor:
        """Return the mean patch token, float32 (B, 96), of uint8 (B, 3, 16, 16); see `tokens`."""
        return self.tokens(images).mean(dim=1).float()

    def forward(self, images: Tensor) -> Tensor:
        """Return class logits, float32 (B, 10), for uint8 (B, 3, 16, 16); errors as `features`."""
        return self.vit.head(self.features(images)).float()
