"""DINOv2 (arXiv 2304.07193) through timm, with REPA's preprocessing."""

import torch
import torch.nn.functional as F
from torch import nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class DINOv2(nn.Module):
    """Patch tokens after the final norm.

    As in REPA the image is normalised first, then resized (bicubic, no antialias); timm resamples
    the position embedding (bicubic, antialias) to the patch grid of `input_size`.

    Args:
        timm_name: a timm model name, for example "vit_base_patch14_dinov2.lvd142m".
        input_size: height and width of the encoder's input, in pixels, a multiple of 14.
        pretrained: weights from timm's hub; random otherwise.

    Raises:
        RuntimeError: the weights can be neither found nor fetched.
    """

    def __init__(self, timm_name: str, input_size: int, pretrained: bool = True) -> None:
        super().__init__()
        import timm

        self.input_size = input_size
        try:
            self.vit = timm.create_model(
                timm_name, pretrained=pretrained, img_size=input_size, num_classes=0
            )
        except (OSError, RuntimeError) as error:
            if not pretrained:
                raise
            raise RuntimeError(
                f"the weights of {timm_name} are neither in the local cache nor can they be "
                f"fetched; with network access, run once: "
                f"python -c \"import timm; timm.create_model('{timm_name}', pretrained=True)\""
            ) from error
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, R, R) -> (B, N, width)."""
        x = (images.float() / 255 - self.mean) / self.std
        x = F.interpolate(x, size=(self.input_size,) * 2, mode="bicubic")
        return self.vit.forward_features(x)[:, self.vit.num_prefix_tokens :]
