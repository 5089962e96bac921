"""DINOv2 (arXiv 2304.07193) through timm, with REPA's preprocessing."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from repa_fast.encoders.files import differences, measure, read, some, unwrap
from repa_fast.encoders.vit import IMAGENET_MEAN, IMAGENET_STD

SIZES = {
    "s": ("small", 384, 12),
    "b": ("base", 768, 12),
    "l": ("large", 1024, 24),
    "g": ("giant", 1536, 40),
}
"""Letter -> timm's word, width, depth."""
STEM = {"patch_embed.proj.weight": 4, "cls_token": 3, "pos_embed": 3}
"""What every DINOv2 state dict has -> its number of axes."""


def encoder_name(letter: str, registers: bool) -> str:
    """Our name, as in `--enc-type`."""
    return f"dinov2{'reg' if registers else ''}-vit-{letter}"


def timm_name(letter: str, registers: bool) -> str:
    """timm's name, which is also the name of its weights on the Hugging Face hub."""
    return f"vit_{SIZES[letter][0]}_patch14_{'reg4_' if registers else ''}dinov2.lvd142m"


def official_file(letter: str, registers: bool) -> str:
    """The file that facebookresearch/dinov2 publishes."""
    return f"dinov2_vit{letter}14_{'reg4_' if registers else ''}pretrain.pth"


class DINOv2(nn.Module):
    """Patch tokens after the final norm, without class and register tokens. Always frozen.

    As in REPA the image is normalised first, then resized (bicubic, no antialias), and the position
    embedding is resampled (bicubic, antialias) to the patch grid of `input_size`.

    Args:
        letter: size, one of s, b, l, g.
        registers: the variant with four register tokens.
        input_size: height and width of the encoder's input, in pixels, a multiple of 14.
        weights: file as for `load_file`; timm's hub if empty.
        pretrained: load weights; random otherwise.

    Raises:
        RuntimeError: the weights can be neither found nor fetched.
        ValueError: `weights` is not a file of this encoder.
    """

    def __init__(
        self,
        letter: str,
        registers: bool,
        input_size: int,
        weights: str = "",
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        import timm

        self.input_size = input_size
        name = timm_name(letter, registers)
        from_hub = pretrained and not weights
        try:
            self.vit = timm.create_model(
                name, pretrained=from_hub, img_size=input_size, num_classes=0
            )
        except (OSError, RuntimeError) as error:
            if not from_hub:
                raise
            raise RuntimeError(
                f"the weights of {encoder_name(letter, registers)} are neither in the local cache "
                f"nor can they be fetched from timm/{name} on the Hugging Face hub; give them with "
                f"--enc-weights FILE, where FILE is {official_file(letter, registers)} of "
                f"facebookresearch/dinov2 or model.safetensors of timm/{name}"
            ) from error
        if pretrained and weights:
            load_file(self.vit, weights)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, R, R) -> floating point (B, N, width), tokens in row-major order."""
        x = (images.float() / 255 - self.mean) / self.std
        x = F.interpolate(x, size=(self.input_size,) * 2, mode="bicubic")
        return self.vit.forward_features(x)[:, self.vit.num_prefix_tokens :]


def load_file(vit: nn.Module, path: str | Path) -> None:
    """Load weights into a timm DINOv2, resampling the position embedding to its grid.

    Args:
        vit: timm's VisionTransformer; its parameters keep their dtype.
        path: .pth of facebookresearch/dinov2, or a .safetensors or .pth of timm's state dict.

    Raises:
        ValueError: no such file, not weights, or weights of another encoder; names what differs.
    """
    from timm.models.vision_transformer import checkpoint_filter_fn

    given = read_file(path)
    wanted = describe(vit.state_dict())
    got = describe(given)
    if got != wanted:
        raise ValueError(f"{path} holds {got}, expected {wanted}")
    state = checkpoint_filter_fn(dict(given), vit)
    problems = differences(state, vit.state_dict())
    if problems:
        raise ValueError(f"{path} holds {got}, but {'; '.join(problems)}")
    vit.load_state_dict(state)


def read_file(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in a .safetensors or torch file, read without executing pickled code.

    Raises:
        ValueError: no such file, or not a state dict of a ViT; says what was expected.
    """
    state = unwrap(read(path), "state_dict", "model")
    missing = [name for name, ndim in STEM.items() if getattr(state.get(name), "ndim", 0) != ndim]
    if missing:
        raise ValueError(
            f"--enc-weights: {path} is not a DINOv2 state dict: expected {', '.join(missing)}, "
            f"got {some(sorted(state)) or 'nothing'}"
        )
    return state


def describe(state: dict[str, torch.Tensor]) -> str:
    """Which encoder a state dict, in official or timm's naming, seems to be."""
    width, depth, patch = measure(state)
    tokens = [state[name].shape[1] for name in ("register_tokens", "reg_token") if name in state]
    registers = sum(tokens)
    for letter, (_, *known) in SIZES.items():
        if [width, depth] == known and patch == 14 and registers in (0, 4):
            return encoder_name(letter, registers == 4)
    return f"a ViT of width {width}, depth {depth}, patch size {patch}, {registers} registers"
