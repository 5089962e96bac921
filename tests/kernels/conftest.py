import functools

import pytest
import torch

# torch caches the functions that `with torch.device(...)` redirects; cached while patched, they
# would stay patched for the rest of the process.
torch.utils._device._device_constructors()


def _nan_filled(allocate):
    @functools.wraps(allocate)
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() or tensor.is_complex():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def nan_filled_empty(monkeypatch):
    """Uninitialised memory reads as NaN, so an element that no kernel wrote fails its test."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _nan_filled(getattr(owner, name)))
