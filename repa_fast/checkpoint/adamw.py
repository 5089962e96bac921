"""AdamW's state as files of other programs hold it, checked before any of it is used."""

import torch

from repa_fast.checkpoint.layout import MOST
from repa_fast.distributed import shard_like
from repa_fast.encoders.files import expect_real, unwrap
from repa_fast.models.sit import SiT
from repa_fast.words import short


def optimizer_state(
    model: SiT, saved_names: list[str], saved: object, began: bool
) -> dict[int, dict[str, torch.Tensor]]:
    """Return torch AdamW's state by our numbers of parameters, copied, whole and checked.

    Args:
        model: whose parameters they are; its optimizer has all of them, in their order.
        saved_names: those of the file's weights, which are in the order of the parameters of
            whoever wrote it.
        saved: the optimizer's state_dict; hyperparameters stay the config's.
        began: whether the run has just begun, when the optimizer has no state yet.

    ValueError if it is none, or of other parameters, or a value is not what AdamW leaves.
    """
    given, expected = _numbered(saved), len(saved_names)
    if given != [*range(expected)]:
        raise ValueError(
            f"the optimizer's param_groups number {len(given)} parameters, "
            f"expected {expected}, from 0 on"
        )
    if odd := [n for n in saved["state"] if type(n) is not int or not 0 <= n < expected]:
        raise ValueError(f"it has a state of parameter {short(odd[0])}, expected 0..{expected - 1}")
    state, number = {}, {name: number for number, name in enumerate(saved_names)}
    for own_number, (name, parameter) in enumerate(model.named_parameters()):
        if not parameter.requires_grad:
            continue
        if number[name] in saved["state"]:
            state[own_number] = _moments(name, saved["state"][number[name]], parameter)
        elif not began:
            raise ValueError(f"it has no state of {name}, expected one of all that is trained")
    return state


def _numbered(saved: object) -> list:
    """Return the numbers of parameters in an optimizer's state_dict, group after group."""
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    if not (isinstance(groups, list) and isinstance(saved.get("state"), dict)):
        raise ValueError(f"it is {short(saved)}, expected AdamW's state and param_groups")
    found = [group.get("params") if isinstance(group, dict) else None for group in groups]
    numbers = [n for params in found if isinstance(params, list) for n in params]
    if not all(isinstance(p, list) for p in found) or not all(type(n) is int for n in numbers):
        raise ValueError("its param_groups are none, expected lists of numbers under params")
    return numbers


def _moments(name: str, values: object, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the state of a parameter as tensors that share no memory, the step on the host."""
    if not isinstance(values, dict):
        raise ValueError(f"the state of {name} is {short(values)}, expected tensors")
    step = values.get("step")
    if isinstance(step, int | float) and abs(step) <= MOST:  # of earlier torch
        step = torch.tensor(float(step))
    found = unwrap({key: values.get(key) for key in ("exp_avg", "exp_avg_sq")} | {"step": step})
    for key, shape in {"exp_avg": like.shape, "exp_avg_sq": like.shape, "step": ()}.items():
        if key not in found or found[key].shape != shape:
            what = tuple(found[key].shape) if key in found else short(values.get(key))
            raise ValueError(f"{key} of {name} is {what}, expected {tuple(shape)}")
    count = found.pop("step")
    try:
        expect_real(found)
    except ValueError as error:
        raise ValueError(f"the state of {name}: {error}") from error
    if found["exp_avg_sq"].min() < 0:
        raise ValueError(f"exp_avg_sq of {name} is negative, expected squares")
    if count.is_complex() or not 0 <= count.item() <= MOST:
        raise ValueError(f"step of {name} is {count.item()}, expected 0 to 2**40")
    # copies, as AdamW writes in place and values may share or repeat memory, also the file's
    own = {"device": like.device, "copy": True, "memory_format": torch.contiguous_format}
    copied = {key: shard_like(value.to(**own), like) for key, value in found.items()}
    return copied | {"step": count.float().clone()}
