"""Whether a provider of benchmarks/sample/sample.py samples what it should, in a few steps."""

import copy

import torch

from benchmarks.sample import rival as sample_rival
from repa_fast import ops
from repa_fast.backend import dispatch
from repa_fast.diffusion import samplers
from repa_fast.models.sit import SiT
from repa_fast.testing import assert_within_budget

STEPS = 4
"""With guidance on [0, 0.7] one without guidance and three with it."""
ROUNDOFF = {"bf16": 2**-8, "tf32": 2**-11, "fp32": 2**-24}
ROUNDINGS = 64
"""Bound on a relative RMS error in units of roundoff: a dozen roundings in each of at most 28
blocks add up like a random walk to 18, guidance doubles that, and some terms are above 1."""
AGREEMENT = 1e-9
"""Relative, of two samplers in fp64, whose Lipschitz constants multiply some 1e-16."""


class Gate:
    """Latents in fp64, and by the rival with plain kernels in each precision.

    A sampling starts from noise (B, C, h, w) fp32, labels (B) and index (B); `model` is not
    compiled, `seed` is of the increments. Raises RuntimeError if our loop and the rival differ.
    """

    def __init__(
        self,
        model: SiT,
        noise: torch.Tensor,
        labels: torch.Tensor,
        index: torch.Tensor,
        seed: int,
        guidance: dict[str, float],
    ) -> None:
        self.increments = torch.stack(
            [ops.standard_normal(noise.shape, seed, step, index) for step in range(STEPS - 1)]
        )
        self._labels, self._guidance = labels, guidance
        dispatch.use_kernels("reference")
        exact = copy.deepcopy(model).double()
        self.oracle = self._rival(exact, noise.double())
        interval = (guidance["guidance_low"], guidance["guidance_high"])
        given = {"cfg_scale": guidance["cfg_scale"], "guidance_interval": interval}
        given |= {"num_steps": STEPS, "noise": self.increments.double()}
        ours = samplers.euler_maruyama(exact, noise.double(), labels, **given)
        if not (difference := self._relative(ours)) <= AGREEMENT:
            raise RuntimeError(f"the samplers differ by {difference:.1e} in fp64, no figure")
        self._working = {"no": self._rival(model, noise)}
        with torch.autocast(noise.device.type, dtype=torch.bfloat16):
            self._working["bf16"] = self._rival(model, noise)
        dispatch.use_kernels(None)

    def why_wrong(self, latents: torch.Tensor, precision: str, *, official: bool) -> str:
        """Return what is wrong with latents after STEPS steps, or "".

        Latents of ours have to be within twice the error of the rival's loop with plain kernels in
        the same precision ("bf16" or "no"); and all within ROUNDINGS units of roundoff.
        """
        cuda = latents.device.type == "cuda"
        unit = "bf16" if precision == "bf16" else "tf32" if cuda else "fp32"
        error, bound = self._relative(latents), ROUNDINGS * ROUNDOFF[unit]
        if not error <= bound:
            return f"relative error {error:.1e}, expected at most {bound:.1e}"
        if official:
            return ""
        try:
            assert_within_budget("latents", latents, self.oracle, self._working[precision])
        except AssertionError as wrong:
            return str(wrong)
        return ""

    def _rival(self, model: SiT, noise: torch.Tensor) -> torch.Tensor:
        given = {"num_steps": STEPS, "increments": self.increments, **self._guidance}
        return sample_rival.sample(model, noise, self._labels, **given)

    def _relative(self, latents: torch.Tensor) -> float:
        square = (latents - self.oracle).square().mean() / self.oracle.square().mean()
        return square.sqrt().item()
