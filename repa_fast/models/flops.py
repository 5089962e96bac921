"""Floating-point operations of the models, counted as 2 per multiply-add.

Only matmuls count; norms, activations and softmax are below one percent.
"""

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s by a part of the device's name, from the vendor's datasheets."""


def transformer_flops(*, tokens: int, width: int, depth: int, mlp_ratio: float = 4.0) -> float:
    """Count forward FLOPs of pre-norm blocks (qkv, attention, projection, MLP) for one image."""
    linear = (8 + 4 * mlp_ratio) * width**2 * tokens
    attention = 4 * tokens**2 * width
    return depth * (linear + attention)


def sit_flops(*, tokens: int, width: int, depth: int, mlp_ratio: float, patch_values: int) -> float:
    """Count forward FLOPs of a SiT for one image; `patch_values` is P * P * C."""
    blocks = transformer_flops(tokens=tokens, width=width, depth=depth, mlp_ratio=mlp_ratio)
    modulation = 2 * width * (6 * width * depth + 2 * width)
    patches = 2 * 2 * patch_values * width * tokens  # into the model and out of it
    time = 2 * (256 * width + width**2)
    return blocks + modulation + patches + time


def projector_flops(*, tokens: int, width: int, projector_dim: int, z_dim: int) -> float:
    """Count forward FLOPs of one projector for one image."""
    return 2 * tokens * projector_dim * (width + projector_dim + z_dim)


def vit_flops(
    *, patches: int, prefix: int, width: int, depth: int, patch_size: int, mlp_ratio: float = 4.0
) -> float:
    """Count forward FLOPs of a ViT on an RGB image; `prefix` is class and register tokens."""
    embed = 2 * 3 * patch_size**2 * width * patches
    tokens = patches + prefix
    return embed + transformer_flops(tokens=tokens, width=width, depth=depth, mlp_ratio=mlp_ratio)


def peak_flops(device_name: str) -> float | None:
    """Return the peak dense bf16 FLOP/s of a device, None where it is not known."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)
