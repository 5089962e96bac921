"""Weight files of encoders: read without executing pickled code, and compared with a model."""

import argparse
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

SHOWN_NAMES = 6

Weights = dict[str, torch.Tensor]


def read(path: str | Path, allow_namespace: bool = False) -> dict:
    """The dictionary in a .safetensors or torch file, its tensors on the CPU, perhaps mapped.

    Args:
        path: the file.
        allow_namespace: let `argparse.Namespace` through, which training checkpoints keep their
            flags in; anything else that is not weights or plain Python is refused in any case.

    Raises:
        ValueError: no such file, or not such a dictionary; says what was expected.
    """
    if not Path(path).is_file():
        raise ValueError(f"--enc-weights: {path} is not a file")
    try:
        is_script = _is_torchscript(path)
        content = None if is_script else _content(path, allow_namespace)
    except Exception as error:  # a damaged file fails in any way
        raise _unreadable(path, type(error).__name__) from error
    if is_script:
        raise ValueError(
            f"--enc-weights: {path} is a TorchScript archive, which holds code; expected weights. "
            'Where you trust it, write them with python -c "import torch; '
            f"torch.save(torch.jit.load('{path}', 'cpu').state_dict(), 'weights.pth')\" "
            "and give weights.pth"
        )
    if not isinstance(content, dict):
        raise _unreadable(path, f"expected a dictionary, got {type(content).__name__}")
    return content


def _unreadable(path: str | Path, reason: str) -> ValueError:
    return ValueError(
        f"--enc-weights: {path} cannot be read as .safetensors or as weights of torch.save: "
        f"{reason}"
    )


def _is_torchscript(path: str | Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _content(path: str | Path, allow_namespace: bool) -> object:
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    mappable = zipfile.is_zipfile(path)  # since torch 1.6; spares reading what is not used
    with torch.serialization.safe_globals([argparse.Namespace] if allow_namespace else []):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)


def unwrap(content: dict, *keys: str) -> Weights:
    """The tensors under the first of `keys` that is there, or at the top; without "module."."""
    inner = next((content[key] for key in keys if isinstance(content.get(key), dict)), content)
    return {
        name.removeprefix("module."): value
        for name, value in inner.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }


def measure(state: Weights) -> tuple[int, int, int]:
    """Width, depth and patch size of a ViT from its state dict, in timm's naming."""
    width, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    blocks = [re.match(r"blocks\.(\d+)\.", name) for name in state]
    depth = max((int(block[1]) + 1 for block in blocks if block), default=0)
    return width, depth, patch_size


def differences(state: Weights, wanted: Weights) -> list[str]:
    """What keeps `state` from being loaded in the place of `wanted`, in words."""
    groups = {
        "lacks": [name for name in wanted if name not in state],
        "also has": [name for name in state if name not in wanted],
        "has other shapes": [
            f"{name} {tuple(state[name].shape)}, expected {tuple(wanted[name].shape)}"
            for name in wanted
            if name in state and state[name].shape != wanted[name].shape
        ],
    }
    return [f"{what} {len(names)}: {some(names)}" for what, names in groups.items() if names]


def some(names: Sequence[str]) -> str:
    """The first of `names`, in words."""
    return ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
