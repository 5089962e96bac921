"""SiT: a transformer on latent patches that predicts the velocity of an interpolant.

The architecture is DiT's with adaLN-zero (arXiv 2212.09748), used by SiT (arXiv 2401.08740) and,
with projection heads on one hidden state, by REPA (arXiv 2410.06940). Parameter names, shapes and
order are those of the official REPA checkpoints.

Shapes: B batch, N tokens, D width, H heads, K head dim, C latent channels, P patch size.
Time t lies in [0, 1], 0 is data and 1 is noise; it enters the embedder unscaled.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repa_fast import ops
from repa_fast.contracts import expect_choice
from repa_fast.models.embed import (
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    sincos_position_embedding,
)
from repa_fast.models.projector import ConvProjector, Projector, SimpleHead

SIZES = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
PATCH_SIZES = (2, 4, 8)


def size(name: str) -> dict[str, int]:
    """Return depth, hidden_size, num_heads and patch_size of {SiT,DiT}-{S,B,L,XL}/{2,4,8}."""
    known = {
        f"{kind}-{size}/{patch}": {**arguments, "patch_size": patch}
        for kind in ("SiT", "DiT")
        for size, arguments in SIZES.items()
        for patch in PATCH_SIZES
    }
    expect_choice("model", name, tuple(known))
    return known[name]


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, D), optionally with LayerNorm on queries and keys."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool, fused_attn: bool) -> None:
        super().__init__()
        head_dim = hidden_size // num_heads
        self.num_heads = num_heads
        self.fused_attn = fused_attn
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.qk_norm = qk_norm
        self.q_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        backend = None if self.fused_attn else "reference"
        if self.qk_norm:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, K) each
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
            out = ops.attention(q, k, v, backend=backend).transpose(1, 2)
        else:
            out = ops.attention_packed(qkv, backend=backend)
        return self.proj(out.reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two linear layers with tanh-approximated GELU between them."""

    def __init__(self, hidden_size: int, mlp_hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden)
        self.fc2 = nn.Linear(mlp_hidden, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiTBlock(nn.Module):
    """Attention and MLP with adaLN-zero, its MLP branch handed on as pending.

    `adaLN_modulation` belongs to the block but is called by the model, which passes its result in.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: bool, fused_attn: bool
    ) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, num_heads, qk_norm, fused_attn)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(
        self, x: Tensor, branch: Tensor | None, gate: Tensor | None, modulation: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add the pending gate * branch to x (B, N, D), then run attention and MLP.

        branch (B, N, D) and gate (B, D) are None where nothing is pending; modulation is (B, 6D).
        Returns the residual stream before the MLP's addition, the MLP branch and its gate.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        x, normed = add_and_norm(x, branch, gate, shift_a, scale_a)
        x, normed = ops.gate_residual_adaln(x, self.attn(normed), gate_a, shift_m, scale_m)
        return x, self.mlp(normed), gate_m.contiguous()


class FinalLayer(nn.Module):
    """adaLN and a linear map to the P * P * C values of each patch."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, branch: Tensor | None, gate: Tensor | None, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        _, normed = add_and_norm(x, branch, gate, shift, scale)
        return self.linear(normed)


def run_blocks(
    blocks: Sequence[SiTBlock],
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    modulations: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run consecutive blocks, each with its own modulation; arguments and results are a block's."""
    for block, modulation in zip(blocks, modulations):
        x, branch, gate = block(x, branch, gate, modulation)
    return x, branch, gate


def add_and_norm(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (x with the pending branch added, if any; its adaLN)."""
    if branch is None:
        return x, ops.adaln(x, shift, scale)
    return ops.gate_residual_adaln(x, branch, gate, shift, scale)


class SiT(nn.Module):
    """The model. Keyword names are those of the official REPA constructor.

    Args:
        input_size: height and width of the latent, in latent pixels.
        patch_size: P; must divide input_size.
        in_channels: C; the velocity has as many.
        hidden_size: D.
        depth: number of blocks.
        num_heads: H; must divide hidden_size.
        mlp_ratio: hidden width of the MLP, over hidden_size.
        encoder_depth: 1-based index of the block whose output is projected.
        num_classes: real classes; the embedding table always has one more row, the null label.
        z_dims: feature width of each encoder; empty for a model without projectors.
        projector_dim: hidden width of the projectors.
        projector: "mlp", REPA's, or "conv", iREPA's.
        learn_sigma: DiT's 2C output channels, noise and variance, instead of a velocity's C.
        self_align: SRA's head `ap_head` on the same hidden state, beside or instead of projectors.
        qk_norm: LayerNorm on queries and keys.
        fused_attn: the process's attention backend instead of the explicit softmax.
        path_type: the official constructor's, without effect, as the next three.
        use_cfg: without effect.
        decoder_hidden_size: without effect.
        class_dropout_prob: without effect; the caller drops labels, and tells `forward` which.

    Attributes:
        residual_dtype: of the residual stream; None is fp32 (fp64 for fp64 models).
        joint_adaln: None, or what computes the modulations of all blocks at once: c (B, D) ->
            (B, 6D) of each block. Training sets it where the layers' weights are one tensor
            (repa_fast.train.leaves).
        region: how many consecutive blocks `forward` runs as one; divides depth and encoder_depth.
        run_region: what runs them, as `run_blocks` does; training compiles it.

    Raises:
        ValueError: sizes that do not divide, or an encoder_depth outside 1..depth.
    """

    region = 1
    run_region = staticmethod(run_blocks)

    def __init__(
        self,
        path_type: str = "edm",
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        decoder_hidden_size: int = 768,
        encoder_depth: int = 8,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        use_cfg: bool = False,
        z_dims: Sequence[int] = (768,),
        projector_dim: int = 2048,
        fused_attn: bool = True,
        qk_norm: bool = False,
        self_align: bool = False,
        projector: str = "mlp",
        learn_sigma: bool = False,
    ) -> None:
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide input_size {input_size}")
        if hidden_size % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide hidden_size {hidden_size}")
        if hidden_size % 4:
            raise ValueError(f"hidden_size is {hidden_size}, expected a multiple of 4")
        if (z_dims or self_align) and not 1 <= encoder_depth <= depth:
            raise ValueError(f"encoder_depth is {encoder_depth}, expected 1..{depth} (the depth)")
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.input_size = input_size
        self.patch_size = patch_size
        self.num_classes = num_classes
        self.encoder_depth = encoder_depth
        grid = input_size // patch_size
        self.num_tokens = grid * grid
        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        table = sincos_position_embedding(hidden_size, grid)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(
            SiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm, fused_attn) for _ in range(depth)
        )
        expect_choice("projector", projector, ("mlp", "conv"))
        self.projectors = nn.ModuleList(
            Projector(hidden_size, projector_dim, z_dim)
            if projector == "mlp"
            else ConvProjector(hidden_size, z_dim, grid)
            for z_dim in z_dims
        )
        self.ap_head = SimpleHead(hidden_size) if self_align else None
        self.joint_adaln: Callable[[Tensor], Iterable[Tensor]] | None = None
        self.residual_dtype: torch.dtype | None = None
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Draw Xavier-uniform linear layers, N(0, 0.02) embeddings; zero adaLN and final layers."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
            nn.init.zeros_(layer.adaLN_modulation[1].bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        drop: Tensor | None = None,
        *,
        project: bool | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute the velocity of noisy latents and, for training, the projected hidden states.

        Args:
            x: (B, C, h, w), noisy latents.
            t: (B), time in [0, 1].
            y: (B), int64 labels in 0..num_classes, the last being the null label.
            drop: (B), bool; True replaces the label by the null label.
            project: whether to run the projectors; by default in train mode only.

        Returns:
            (velocity (B, C, h, w) in the dtype of x, [(B, N, z_dim) per encoder, and (B, N, D) of
            SRA's head]); the list is empty where they are not run.

        Raises:
            ValueError: latents of another shape, or labels out of range (checked on CPU).
        """
        project = self.training if project is None else project
        heads = [*self.projectors, *([] if self.ap_head is None else [self.ap_head])]
        residual, c = self._embed(x, t, y, drop)
        projections: list[Tensor] = []
        branch = gate = None
        blocks, modulations = list(self.blocks), iter(self.modulations(c))
        for start in range(0, len(blocks), self.region):
            region = blocks[start : start + self.region]
            given = tuple(islice(modulations, len(region)))
            residual, branch, gate = self.run_region(region, residual, branch, gate, given)
            if project and heads and start + len(region) == self.encoder_depth:
                residual, branch, gate = ops.gate_residual(residual, branch, gate), None, None
                projections = [head(residual) for head in heads]
        patches = self.final_layer(residual, branch, gate, c)
        return self.unpatchify(patches).to(x.dtype), projections

    def hidden(
        self, x: Tensor, t: Tensor, y: Tensor, drop: Tensor | None = None, *, depth: int
    ) -> Tensor:
        """Compute the hidden state (B, N, D) after block `depth` (1-based), in the residual dtype.

        Later blocks do not run. Other arguments and errors as for `forward`.
        """
        residual, c = self._embed(x, t, y, drop)
        branch = gate = None
        for block, modulation in zip(self.blocks[:depth], self.modulations(c)):
            residual, branch, gate = block(residual, branch, gate, modulation)
        return ops.gate_residual(residual, branch, gate)

    def modulations(self, c: Tensor) -> Iterable[Tensor]:
        """Yield (B, 6D) of each block, from the condition c (B, D), each when its block is next.

        Where `joint_adaln` is set, all of them are computed at once.
        """
        if self.joint_adaln is not None:
            return self.joint_adaln(c)
        return (block.adaLN_modulation(c) for block in self.blocks)

    def _embed(self, x: Tensor, t: Tensor, y: Tensor, drop: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the residual stream (B, N, D) before the first block, and the condition (B, D)."""
        expected = (self.in_channels, self.input_size, self.input_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"latents have shape {tuple(x.shape)}, expected (B, {expected})")
        # a view of (B, D, N) would be the layout of the first residual state alone, and compiled
        # blocks would be two: one for it, and one with symbolic strides
        tokens = self.x_embedder(x).contiguous()
        residual = tokens.to(torch.promote_types(tokens.dtype, torch.float32)) + self.pos_embed
        if self.residual_dtype is not None:
            residual = residual.to(self.residual_dtype)
        return residual, self.t_embedder(t) + self.y_embedder(y, drop)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Arrange (B, N, P * P * C) as (B, C, h, w), C the output channels."""
        grid = self.input_size // self.patch_size
        return (
            patches.unflatten(1, (grid, grid))
            .unflatten(-1, (self.patch_size, self.patch_size, self.out_channels))
            .permute(0, 5, 1, 3, 2, 4)
            .flatten(4, 5)
            .flatten(2, 3)
        )
