"""Weight files of encoders: read without executing pickled code, and renamed as timm has them.

A converter takes what a file holds (`read`) and returns the vision encoder's tensors, without
heads, whose patch embedding and blocks have timm's names; what has timm's names already comes out
as it is. Not so for MoCo v3, which timm has no weights of: another method's ViT would pass for it.
`timm_names` and `eva_names` then let timm's own filters do the rest. What is missing or too much is
for the caller to find.
"""

import argparse
import math
import mmap
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from repa_fast.whole import open_regular
from repa_fast.words import one_line, some

Weights = dict[str, Tensor]

CLIP = (  # timm's filter would also resample another table, which is to be refused
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
SIGLIP = (  # timm knows big_vision's names only
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
)
MOCO = (  # slips in the ViT-L file
    (r"^blocks\.13\.norm13\.", "blocks.13.norm1."),
    (r"^blocks\.13\.mlp\.fc13\.", "blocks.13.mlp.fc1."),
    (r"^blocks\.14\.norm14\.", "blocks.14.norm2."),
    (r"^blocks\.14\.mlp\.fc14\.", "blocks.14.mlp.fc2."),
)
REFUSED = re.compile(r"GLOBAL ([\w.]+)")
"""What torch says of a name that its unpickler does not know."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Of weights."""
REPEATED = 2**30
"""Bytes that the tensors of a file may repeat, as by strides of 0, which would take memory."""


class _Damaged(ValueError):
    """A member of an archive does not have the checksum that the archive says."""


def load_safely(path: str | Path, allow_namespace: bool = False) -> dict:
    """Return the dictionary in a .safetensors or torch file; tensors are on the CPU, maybe mapped.

    No code in it is executed.

    Args:
        path: the file.
        allow_namespace: let `argparse.Namespace` through, which training checkpoints keep their
            flags in; anything else that is not weights or plain Python is refused in any case.

    Raises:
        ValueError: no such file, damaged, with code in it, or not a dictionary: one line that names
            the file, without torch's advice on how to run the code.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file")
    try:
        content = _load(Path(path), allow_namespace)
    except _Damaged as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    except Exception as error:  # a damaged file fails in any way
        if named := REFUSED.search(str(error)):
            found = f"holds code: it names {named[1]}, expected tensors and plain values"
        else:
            found = "is damaged, or neither .safetensors nor of torch.save"
        raise ValueError(f"{path} {found}") from error
    if content is None:
        raise ValueError(
            f"{path} is a TorchScript archive, which holds code; expected weights. "
            'Where you trust it, write them with python -c "import torch; '
            f"torch.save(torch.jit.load('{path}', 'cpu').state_dict(), 'weights.pth')\" "
            "and give weights.pth"
        )
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dictionary")
    return content


def _load(path: Path, allow_namespace: bool) -> object:
    """Return what is in a file, None of a TorchScript archive; raises anything."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    mappable = zipfile.is_zipfile(path)  # since torch 1.6; spares memory for what is not used
    if mappable:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return None
            # torch would take what is compressed as it lies there
            mappable = all(one.compress_type == zipfile.ZIP_STORED for one in archive.infolist())
            if wrong := _wrong_member(file, archive) if mappable else archive.testzip():
                raise _Damaged(f"{one_line(wrong):.100} has a wrong checksum")
    with (
        torch.serialization.safe_globals([argparse.Namespace] if allow_namespace else []),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of tensors that are refused, such as sparse ones
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)


def _wrong_member(file: BinaryIO, archive: zipfile.ZipFile) -> str | None:
    """Return the first stored member without its CRC-32, which torch never compares, or None.

    The file is mapped and read by as many threads as help; `testzip` would copy it through one.
    """
    with (
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads,
    ):

        def is_wrong(member: zipfile.ZipInfo) -> bool:
            head = member.header_offset  # 30 bytes, then a name and an extra field of any length
            lengths = (view[at : at + 2] for at in (head + 26, head + 28))
            start = head + 30 + sum(int.from_bytes(length, "little") for length in lengths)
            return zlib.crc32(view[start : start + member.file_size]) != member.CRC

        members = archive.infolist()
        found = [*threads.map(is_wrong, members)]
    return members[found.index(True)].filename if any(found) else None


def read(path: str | Path, allow_namespace: bool = False) -> dict:
    """Return the dictionary in an encoder's file; arguments and errors are `load_safely`'s."""
    try:
        return load_safely(path, allow_namespace)
    except ValueError as error:
        raise ValueError(f"--enc-weights: {error}") from error


def unwrap(content: dict, *keys: str) -> Weights:
    """Return the tensors below the first of `keys` that is there, or on top, without "module.".

    ValueError if two of them have one name then, or if one is sparse, quantized, not on the CPU, or
    otherwise no plain array of values, or if they are larger than the values in the file.
    """
    inner = next((content[key] for key in keys if isinstance(content.get(key), dict)), content)
    state, held = {}, {}
    for name, value in inner.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            if (bare := name.removeprefix("module.")) in state:
                raise ValueError(f"{_short(bare)} is there with and without module., expected one")
            if found := _oddity(value):
                raise ValueError(f"{_short(name)} is {found}, expected a dense tensor")
            state[bare], storage = value, value.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    total = sum(value.nbytes for value in state.values())
    if total > sum(held.values()) + REPEATED:
        largest = _short(max(state, key=lambda name: state[name].nbytes))
        raise ValueError(
            f"the tensors are of {total} bytes (most of them {largest}), expected no more than the "
            f"{sum(held.values())} that the file has for them"
        )
    return state


def _oddity(tensor: Tensor) -> str:
    """Return what makes a tensor no plain array of values on the CPU; "" if it is one."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.is_nested:
        return "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
    if tensor.device.type != "cpu":
        return f"on {tensor.device.type}"
    return "quantized" if tensor.is_quantized else ""


def expect_real(state: Weights) -> None:
    """Raise ValueError unless these are weights: floating point, and every value finite.

    Of what `unwrap` returns, and of that which is loaded alone: files have counters beside it.
    """
    for name, tensor in state.items():
        if tensor.dtype not in DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{_short(name)} is of {kind}, expected floating-point numbers")
        if not _is_finite(tensor):
            raise ValueError(f"{_short(name)} has NaN or infinite values, expected finite ones")


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite, mostly in one pass: their sum seldom overflows."""
    once = [slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride()]
    tensor = tensor.detach()[tuple(once)]
    total = tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    return math.isfinite(total.item()) or bool(tensor.isfinite().all())


def _short(name: str) -> str:
    return f"{one_line(name):.100}"


def measure(state: Weights) -> tuple[int, int, int, int]:
    """Return width, depth, patch size and registers of a ViT from its state dict."""
    width, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    blocks = [re.match(r"blocks\.(\d{1,6})\.", name) for name in state]
    depth = max((int(block[1]) + 1 for block in blocks if block), default=0)
    tokens = (state[name] for name in ("register_tokens", "reg_token") if name in state)
    return width, depth, patch_size, sum(table.shape[1] for table in tokens if table.ndim == 3)


def differences(state: Weights, wanted: Weights) -> list[str]:
    """Say what keeps `state` from being loaded in the place of `wanted`."""
    groups = {
        "lacks": [name for name in wanted if name not in state],
        "also has": [name for name in state if name not in wanted],
        "has other shapes": [
            f"{name} {tuple(state[name].shape)}, expected {tuple(wanted[name].shape)}"
            for name in wanted
            if name in state and state[name].shape != wanted[name].shape
        ],
    }
    return [f"{what} {len(names)}: {some(names, 6)}" for what, names in groups.items() if names]


def lacking(state: Weights, axes: Mapping[str, int]) -> list[str]:
    """Return the names that are not in `state`, or not with as many axes as `axes` says."""
    return [name for name, count in axes.items() if getattr(state.get(name), "ndim", -1) != count]


def dino(content: dict) -> Weights:
    """Convert facebookresearch/dino's backbone, or the teacher of a training checkpoint."""
    return _within(unwrap(content, "teacher"), "backbone.")


def dinov2(content: dict) -> Weights:
    """Return facebookresearch/dinov2's state dict; ValueError where it lacks what each has."""
    state = unwrap(content, "state_dict", "model")
    missing = lacking(state, {"patch_embed.proj.weight": 4, "cls_token": 3, "pos_embed": 3})
    if missing:
        raise ValueError(
            f"is not a DINOv2 state dict: expected {', '.join(missing)}, "
            f"got {some(sorted(state), 6) or 'nothing'}"
        )
    return state


def mocov3(content: dict) -> Weights:
    """Convert facebookresearch/moco-v3's and LTH14/rcg's base encoder, without projection head."""
    state = _below(unwrap(content, "state_dict"), "base_encoder.")
    return _rename(_without(state, "head.", "fc."), MOCO)


def clip(content: dict) -> Weights:
    """Convert openai/CLIP's state dict: the image tower without its projection."""
    state = _without(_within(unwrap(content, "state_dict"), "visual."), "head.")
    state.pop("proj", None)
    return _rename(state, CLIP)


def siglip(content: dict) -> Weights:
    """Convert google/siglip2-* in Hugging Face's naming: the image tower without its head."""
    state = _without(_within(unwrap(content), "vision_model."), "head.", "attn_pool.")
    state = _rename(state, SIGLIP)
    for name in [name for name in state if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        shapes = {state[part].shape if part in state else () for part in parts}
        if len(shapes) == 1 and () not in shapes:
            fused = torch.cat([state.pop(part) for part in parts])
            state[name.replace(".attn.q.", ".attn.qkv.")] = fused
    return state


def timm_names(state: Weights, vit: nn.Module) -> Weights:
    """Rename what is left by timm's filter; resample the position table, bicubic with antialias."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    return _filtered(checkpoint_filter_fn, state, vit)


def eva_names(state: Weights, vit: nn.Module) -> Weights:
    """Rename DINOv3's tensors by timm's filter, which leaves out the periods of the rotation.

    The biases of queries and values are zero where the file has none; that of the keys is masked
    with zeros in the official code and left out here.
    """
    from timm.models.eva import checkpoint_filter_fn

    zeros = {n: torch.zeros_like(v) for n, v in vit.state_dict().items() if n.endswith("_bias")}
    return zeros | _filtered(checkpoint_filter_fn, state, vit)


def _filtered(timms: Callable[..., Weights], state: Weights, vit: nn.Module) -> Weights:
    try:
        return timms(dict(state), vit)
    except Exception:  # of a table that is no square grid, say: its shape is then refused
        return state


def _below(state: Weights, prefix: str) -> Weights:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _within(state: Weights, prefix: str) -> Weights:
    """Return what stands below `prefix`, without it; all of `state` where nothing does."""
    return _below(state, prefix) or state


def _without(state: Weights, *prefixes: str) -> Weights:
    return {name: value for name, value in state.items() if not name.startswith(prefixes)}


def _rename(state: Weights, renames: Sequence[tuple[str, str]]) -> Weights:
    """Rename tensors, and give class token and position table timm's shape (1, N, width)."""
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if name in ("cls_token", "pos_embed") and value.ndim in (1, 2):
            value = value.reshape((1,) * (3 - value.ndim) + value.shape)
        if name in renamed:
            raise ValueError(f"has {_short(name)} under two names, expected one")
        renamed[name] = value
    return renamed
