"""SiT by plain formulas from its weights alone."""

import math

import torch

SMALL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 24,
    "depth": 3,
    "num_heads": 4,
    "encoder_depth": 2,
    "num_classes": 10,
    "z_dims": (5, 7),
    "projector_dim": 11,
}


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def adaln(x, shift, scale):
    return layer_norm(x, 1e-6) * (1 + scale[:, None]) + shift[:, None]


def patchify(x, patch):
    """(B, C, h, w) -> (B, N, C * P * P), values in the order of a convolution's weight."""
    images, _, height, width = x.shape
    rows, columns = height // patch, width // patch
    patches = [
        x[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].reshape(images, -1)
        for r in range(rows)
        for c in range(columns)
    ]
    return torch.stack(patches, dim=1)


def unpatchify(tokens, patch, channels, grid):
    """(B, N, P * P * C), channel last -> (B, C, h, w)."""
    image = tokens.new_zeros(len(tokens), channels, grid * patch, grid * patch)
    for n in range(grid * grid):
        r, c = divmod(n, grid)
        values = tokens[:, n].reshape(-1, patch, patch, channels).movedim(-1, 1)
        image[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] = values
    return image


def attention(state, name, x, heads):
    images, tokens, width = x.shape
    qkv = linear(state, f"{name}.qkv", x).reshape(images, tokens, 3, heads, width // heads)
    q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    if f"{name}.q_norm.weight" in state:
        q = layer_norm(q, 1e-5) * state[f"{name}.q_norm.weight"] + state[f"{name}.q_norm.bias"]
        k = layer_norm(k, 1e-5) * state[f"{name}.k_norm.weight"] + state[f"{name}.k_norm.bias"]
    weights = torch.exp(q @ k.transpose(-1, -2) / math.sqrt(width // heads))
    out = (weights / weights.sum(-1, keepdim=True)) @ v
    return linear(state, f"{name}.proj", out.transpose(1, 2).reshape(x.shape))


def condition(state, t, y):
    frequencies = torch.exp(-math.log(1e4) * torch.arange(128, dtype=t.dtype) / 128)
    angles = t[:, None] * frequencies
    features = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
    hidden = silu(linear(state, "t_embedder.mlp.0", features))
    return linear(state, "t_embedder.mlp.2", hidden) + state["y_embedder.embedding_table.weight"][y]


def functional_sit(state, x, t, y, *, heads=4):
    """(velocity, hidden state after each block) from the weights alone."""
    kernel = state["x_embedder.proj.weight"]
    patch, channels, grid = kernel.shape[-1], x.shape[1], x.shape[-1] // kernel.shape[-1]
    h = patchify(x, patch) @ kernel.flatten(1).T + state["x_embedder.proj.bias"]
    h = h + state["pos_embed"]
    c = silu(condition(state, t, y))
    hidden = []
    while (name := f"blocks.{len(hidden)}") + ".attn.qkv.weight" in state:
        modulation = linear(state, f"{name}.adaLN_modulation.1", c).chunk(6, dim=1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        h = h + gate_a[:, None] * attention(
            state, f"{name}.attn", adaln(h, shift_a, scale_a), heads
        )
        wide = gelu_tanh(linear(state, f"{name}.mlp.fc1", adaln(h, shift_m, scale_m)))
        h = h + gate_m[:, None] * linear(state, f"{name}.mlp.fc2", wide)
        hidden.append(h)
    shift, scale = linear(state, "final_layer.adaLN_modulation.1", c).chunk(2, dim=1)
    tokens = linear(state, "final_layer.linear", adaln(h, shift, scale))
    return unpatchify(tokens, patch, channels, grid), hidden


def project(state, index, x):
    for layer in (0, 2):
        x = silu(linear(state, f"projectors.{index}.{layer}", x))
    return linear(state, f"projectors.{index}.4", x)
