"""The encoders: those of the REPA paper (arXiv 2410.06940), DINOv3 and SigLIP 2.

REPA feeds each at a size that gives 16 x 16 patches of a 256-pixel image; at 512 it defines DINOv2
alone. DINOv3 and SigLIP 2 are not REPA's; they are defined at 512 where their authors do.
"""

from repa_fast.encoders import files
from repa_fast.encoders.vit import Recipe

DINO = Recipe(
    name="dinov1-vit-b",  # arXiv 2104.14294
    model="vit_base_patch16_224.dino",
    file="dino_vitbase16_pretrain.pth of facebookresearch/dino",
    width=768,
    depth=12,
    convert=files.dino,
    adapt=files.timm_names,
)

MAE = Recipe(
    name="mae-vit-l",  # arXiv 2111.06377
    model="vit_large_patch16_224.mae",
    file="mae_pretrain_vit_large.pth of facebookresearch/mae",
    width=1024,
    depth=24,
    convert=lambda content: files.unwrap(content, "model"),
    final_norm=False,
    adapt=files.timm_names,
)

CLIP = Recipe(
    name="clip-vit-L",  # arXiv 2103.00020
    model="vit_large_patch14_clip_quickgelu_224.openai",
    file="the state dict of openai/CLIP's ViT-L-14.pt",
    width=1024,
    depth=24,
    patch_size=14,
    input_sizes={256: 224},
    convert=files.clip,
    resize="before",
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    final_norm=False,
)

IJEPA = Recipe(
    name="jepa-vit-h",  # arXiv 2301.08243
    model="vit_huge_patch14_gap_224.in1k_ijepa",
    file="IN1K-vit.h.14-300e.pth.tar of facebookresearch/ijepa",
    width=1280,
    depth=32,
    patch_size=14,
    prefix=0,
    input_sizes={256: 224},
    # the context encoder, as REPA takes it
    convert=lambda content: files.unwrap(content, "encoder", "target_encoder"),
    resize="after",
)

DINOV2_SIZES = {
    "s": ("small", 384, 12),
    "b": ("base", 768, 12),
    "l": ("large", 1024, 24),
    "g": ("giant", 1536, 40),
}
"""Letter -> timm's word, width, depth."""
DINOV2_NAMES = {
    (width, depth, 14, 4 * registers): f"dinov2{'reg' if registers else ''}-vit-{letter}"
    for registers in (False, True)
    for letter, (_, width, depth) in DINOV2_SIZES.items()
}
"""What `files.measure` gives -> name."""


def dinov2(letter: str, registers: bool) -> Recipe:
    """Return DINOv2 (arXiv 2304.07193), perhaps with its four register tokens.

    As in REPA the image is normalised first, then resized, and the position embedding is resampled
    (bicubic, antialias) to the patch grid of the input.
    """
    word, width, depth = DINOV2_SIZES[letter]
    reg4 = "reg4_" if registers else ""
    return Recipe(
        name=DINOV2_NAMES[width, depth, 14, 4 * registers],
        model=f"vit_{word}_patch14_{reg4}dinov2.lvd142m",
        file=f"dinov2_vit{letter}14_{reg4}pretrain.pth of facebookresearch/dinov2",
        width=width,
        depth=depth,
        patch_size=14,
        prefix=1 + 4 * registers,
        input_sizes={256: 224, 512: 448},
        convert=files.dinov2,
        adapt=files.timm_names,
        resize="after",
        flags=False,
        siblings=DINOV2_NAMES,
    )


def mocov3(letter: str, size: str, width: int, depth: int, heads: int, file: str = "") -> Recipe:
    """Return MoCo v3 (arXiv 2104.02057); timm has its architecture, but not its weights."""
    return Recipe(
        name=f"mocov3-vit-{letter}",
        model=f"vit_{size}_patch16_224",
        file=file or f"vit-{letter}-300ep.pth.tar of facebookresearch/moco-v3",
        width=width,
        depth=depth,
        convert=files.mocov3,
        adapt=files.timm_names,
        hub=False,
        options={"num_heads": heads},
    )


def dinov3(letter: str, size: str, file: str, width: int, depth: int, ratio: float) -> Recipe:
    """Return DINOv3 (arXiv 2508.10104): rotary positions, four registers."""
    return Recipe(
        name=f"dinov3-vit-{letter}",
        model=f"vit_{size}_patch16_dinov3_qkvb.lvd1689m",
        file=f"{file}_pretrain_lvd1689m-*.pth of facebookresearch/dinov3",
        width=width,
        depth=depth,
        prefix=5,
        input_sizes={256: 256, 512: 512},
        convert=lambda content: files.unwrap(content, "teacher", "model"),
        adapt=files.eva_names,
        options={"dynamic_img_size": False},  # the rotation is computed once, not at every step
        mlp_ratio=ratio,
    )


def siglip2(letter: str, size: str, width: int, depth: int, mlp: int, *, has_512: bool) -> Recipe:
    """Return SigLIP 2 (arXiv 2502.14786), weights per resolution; `mlp` is the hidden width."""
    published = "giant-opt" if letter == "g" else size
    return Recipe(
        name=f"siglip2-vit-{letter}",
        model=f"vit_{size}_patch16_siglip_gap_{{size}}.v2_webli",
        file=f"model.safetensors of google/siglip2-{published}-patch16-256"
        + ("; 512 has its own: -patch16-512" if has_512 else ""),
        width=width,
        depth=depth,
        prefix=0,
        input_sizes={256: 256, 512: 512} if has_512 else {256: 256},
        convert=files.siglip,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        options={"act_layer": "gelu_tanh"},  # as in big_vision, at every size
        mlp_ratio=mlp / width,
    )


DINOV2 = tuple(dinov2(letter, registers) for registers in (False, True) for letter in DINOV2_SIZES)
RECIPES = (
    DINO,
    mocov3("s", "small", 384, 12, 12),
    mocov3("b", "base", 768, 12, 12),
    mocov3("l", "large", 1024, 24, 16, "vitl.pth.tar that the README of LTH14/rcg links to"),
    MAE,
    CLIP,
    IJEPA,
    dinov3("s", "small", "dinov3_vits16", 384, 12, 4),
    dinov3("splus", "small_plus", "dinov3_vits16plus", 384, 12, 6),
    dinov3("b", "base", "dinov3_vitb16", 768, 12, 4),
    dinov3("l", "large", "dinov3_vitl16", 1024, 24, 4),
    dinov3("hplus", "huge_plus", "dinov3_vith16plus", 1280, 32, 6),
    siglip2("b", "base", 768, 12, 3072, has_512=True),
    siglip2("l", "large", 1024, 24, 4096, has_512=True),
    siglip2("so400m", "so400m", 1152, 27, 4304, has_512=True),
    siglip2("g", "giantopt", 1536, 40, 6144, has_512=False),
)
