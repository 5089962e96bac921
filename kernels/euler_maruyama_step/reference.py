"""Specification of euler_maruyama_step in plain torch, with its counter-based noise."""

import math

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def euler_maruyama_step_reference(
    x: torch.Tensor,
    v_cond: torch.Tensor,
    v_uncond: torch.Tensor | None,
    dt: float,
    coefficients: tuple[float, float, float, float],
    diffusion: float,
    cfg_scale: float,
    noise: torch.Tensor | None,
) -> torch.Tensor:
    """Return x after one step, computed in the dtype of x.

    x, v_cond, v_uncond and noise are (B, ...); coefficients are alpha, sigma and their time
    derivatives at t.
    """
    v = v_cond.to(x.dtype)
    if v_uncond is not None:
        null = v_uncond.to(x.dtype)
        v = null + cfg_scale * (v - null)
    drift = v
    if diffusion:
        alpha, sigma, d_alpha, d_sigma = coefficients
        score = (alpha * v - d_alpha * x) / (sigma * (d_alpha * sigma - alpha * d_sigma))
        drift = v - diffusion / 2 * score
    x = x + drift * dt
    if noise is not None:
        x = x + math.sqrt(diffusion * abs(dt)) * noise.to(x.dtype)
    return x


def standard_normal(shape: torch.Size, seed: int, step: int, index: torch.Tensor) -> torch.Tensor:
    """Draw normal numbers, a function of (seed, step, sample number, position in the sample).

    Philox 4x32 with 10 rounds (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011),
    key seed, counter (position, low word of the sample number, step, its high word); the first two
    words give one number by Box and Muller's transform.

    shape is (B, ...), index (B) int64; returns fp32 on the device of `index`.
    """
    position = torch.arange(math.prod(shape[1:]), device=index.device)[None]
    sample = index[:, None]
    counter = (
        position & _WORD,  # an index alone Inductor would multiply in 32 bits
        sample & _WORD,
        torch.full_like(sample, step),
        sample >> 32 & _WORD,
    )
    first, second = _philox(counter, (seed & _WORD, seed >> 32))[:2]
    radius = (-2 * torch.log((first.float() + 0.5) * 2**-32)).sqrt()
    return (radius * torch.cos(second.float() * (2 * math.pi * 2**-32))).reshape(shape)


def _philox(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Return four words of 32 bits, as int64."""
    c0, c1, c2, c3 = counter
    for round_ in range(10):
        k0, k1 = ((k + round_ * weyl) & _WORD for k, weyl in zip(key, _WEYL))
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # modulo 2^64
        c0, c1, c2, c3 = (
            (second >> 32 & _WORD) ^ c1 ^ k0,
            second & _WORD,
            (first >> 32 & _WORD) ^ c3 ^ k1,
            first & _WORD,
        )
    return c0, c1, c2, c3
