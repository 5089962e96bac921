"""SiT by plain formulas from its weights alone."""

import math

import torch
import torch.nn.functional as F

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
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def normed(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def adaln(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def attention(state, name, x, heads=4):
    qkv = linear(state, f"{name}.qkv", x).unflatten(-1, (3, heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if f"{name}.q_norm.weight" in state:
        q, k = normed(state, f"{name}.q_norm", q), normed(state, f"{name}.k_norm", k)
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return linear(state, f"{name}.proj", (weights @ v).transpose(1, 2).flatten(2))


def mlp(state, name, x):
    hidden = F.gelu(linear(state, f"{name}.fc1", x), approximate="tanh")
    return linear(state, f"{name}.fc2", hidden)


def condition(state, t, y):
    frequencies = torch.exp(-math.log(1e4) * torch.arange(128, dtype=t.dtype) / 128)
    angles = t[:, None] * frequencies
    features = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
    hidden = F.silu(linear(state, "t_embedder.mlp.0", features))
    return linear(state, "t_embedder.mlp.2", hidden) + state["y_embedder.embedding_table.weight"][y]


def functional_sit(state, x, t, y):
    """(velocity, hidden state after each block) from the weights alone."""
    kernel, bias = (state[f"x_embedder.proj.{end}"] for end in ("weight", "bias"))
    patch, size = kernel.shape[-1], x.shape[-2:]
    h = F.conv2d(x, kernel, bias, stride=patch).flatten(2).mT + state["pos_embed"]
    c = F.silu(condition(state, t, y))
    hidden = []
    while (name := f"blocks.{len(hidden)}") + ".attn.qkv.weight" in state:
        modulation = linear(state, f"{name}.adaLN_modulation.1", c).chunk(6, dim=1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        h = h + gate_a[:, None] * attention(state, f"{name}.attn", adaln(h, shift_a, scale_a))
        h = h + gate_m[:, None] * mlp(state, f"{name}.mlp", adaln(h, shift_m, scale_m))
        hidden.append(h)
    shift, scale = linear(state, "final_layer.adaLN_modulation.1", c).chunk(2, dim=1)
    tokens = linear(state, "final_layer.linear", adaln(h, shift, scale))
    tokens = tokens.unflatten(2, (patch**2, -1)).transpose(2, 3).flatten(2)  # channel first
    return F.fold(tokens.mT, size, patch, stride=patch), hidden


def project(state, index, x):
    for layer in (0, 2):
        x = F.silu(linear(state, f"projectors.{index}.{layer}", x))
    return linear(state, f"projectors.{index}.4", x)
