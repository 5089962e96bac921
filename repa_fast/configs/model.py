"""The transformer."""

from dataclasses import dataclass

from repa_fast.configs.part import Part, expect_at_least


@dataclass(kw_only=True)
class ModelConfig(Part):
    """The transformer."""

    model: str = "SiT-XL/2"
    """SiT-{S,B,L,XL}/{2,4,8}, or DiT-... with OBJECTIVE ddpm."""
    hidden_size: int | None = None
    """Overrides the model's width."""
    depth: int | None = None
    """Overrides the model's number of blocks."""
    num_heads: int | None = None
    """Overrides the model's number of heads."""
    patch_size: int | None = None
    """Overrides the model's patch size."""
    num_classes: int | None = None
    """Number of classes, at least the dataset's and that where not given; the embedding table has
    one more row, the null label."""
    fused_attn: bool = True
    """The backend of ATTENTION; otherwise the explicit softmax."""
    qk_norm: bool = False
    """LayerNorm on queries and keys."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_at_least(self, 1, "hidden_size", "depth", "num_heads", "patch_size", "num_classes")
