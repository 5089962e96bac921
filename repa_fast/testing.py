"""Error budgets and seeded inputs, for tests and benchmarks."""

from pathlib import Path

import torch

from repa_fast import encoders


def assert_within_budget(
    name: str, actual: torch.Tensor, oracle: torch.Tensor, working: torch.Tensor
) -> None:
    """Fail unless `actual` is about as exact as the same maths in its own dtype.

    Errors are differences to the oracle in fp64; both their maximum and their root mean square
    over all elements must satisfy

        error(actual) <= 2 * error(working) + band.

    The band is what rounding the oracle once to the working dtype can cost: per element
    finfo.eps / 2 * max(|oracle|, finfo.tiny), half the spacing of that dtype or more; of it, again,
    the maximum and the root mean square.

    Args:
        name: what is compared, for the message.
        actual: the result under test, any shape, floating.
        oracle: fp64, of that shape; ValueError if it is not finite, or shapes or dtypes differ.
        working: of the shape and dtype of `actual`, the plain formula in working precision.
    """
    if oracle.dtype != torch.float64 or not oracle.isfinite().all():
        raise ValueError(f"{name}: oracle is {oracle.dtype}, expected finite torch.float64")
    for which, tensor in (("actual", actual), ("working", working)):
        if tensor.shape != oracle.shape or tensor.dtype != working.dtype:
            raise ValueError(
                f"{name}: {which} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"expected {working.dtype} {tuple(oracle.shape)}"
            )
    if not oracle.numel():
        return
    info = torch.finfo(working.dtype)
    band = info.eps / 2 * oracle.abs().clamp_min(info.tiny)
    error = actual.detach().double() - oracle
    allowed = working.detach().double() - oracle
    measured = [
        (x.abs().max().item(), x.square().mean().sqrt().item()) for x in (error, allowed, band)
    ]
    for measure, found, plain, rounding in zip(("maximum", "root mean square"), *measured):
        bound = 2 * plain + rounding
        # Written so that NaN fails, and so that an infinite bound allows nothing.
        if not found <= bound < float("inf"):
            raise AssertionError(
                f"{name}: {measure} of the error is {found:.3e}, expected at most {bound:.3e} "
                f"= 2 * {plain:.3e} (the formula in {working.dtype}) + {rounding:.3e}"
            )


def seeded(
    shape: tuple[int, ...],
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    mean: float = 0.0,
    std: float = 1.0,
) -> torch.Tensor:
    """Draw normal numbers on the CPU, a function of (shape, seed), rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (mean + std * values).to(dtype)


def modulation_chunks(
    batch: int, width: int, *, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    """Draw 6 (B, D) vectors as a block gets them: strided chunks of one (B, 6 D) tensor."""
    return seeded((batch, 6 * width), seed=seed, dtype=dtype, std=0.5).chunk(6, dim=-1)


def random_encoder_weights(enc_type: str, resolution: int, folder: Path) -> str:
    """Write random weights of DINOv2 encoders into `folder`; return what `--enc-weights` takes."""
    files = []
    for spec in encoders.specs(enc_type):
        module = spec.build(spec.input_size(resolution), pretrained=False)
        files.append(str(folder / f"{spec.name}.pth"))
        torch.save(module.vit.state_dict(), files[-1])
    return ",".join(files)


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Draw adaLN and final weights from N(0, 0.02), always the same; zeros have few gradients."""
    weights = model.state_dict()
    generator = torch.Generator(next(iter(weights.values())).device).manual_seed(1)
    for name, weight in weights.items():
        if "adaLN" in name or "final_layer" in name:
            weight.normal_(std=0.02, generator=generator)
    model.load_state_dict(weights)  # bf16 leaves too
