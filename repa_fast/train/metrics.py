"""Metrics that stay on the device until they are logged."""

from typing import NamedTuple

import torch

from repa_fast.distributed import World
from repa_fast.words import short

T_BINS = 10


class StepValues(NamedTuple):
    """Losses of one step on this process.

    Attributes:
        loss, denoise: 0-d, means over its images; the total, and that of denoising.
        others: (K), means of the other losses.
        each: (local batch), the losses of denoising.
    """

    loss: torch.Tensor
    denoise: torch.Tensor
    others: torch.Tensor
    each: torch.Tensor


class Accumulator:
    """Sums over the steps since the last reading, in one fp64 vector on the device.

    A skipped step counts as skipped and adds nothing else, so that one NaN does not hide the rest.

    Args:
        others: names of the losses beside that of denoising.

    Attributes:
        bad_run: current number of consecutive skipped steps, int64 on the device.
    """

    def __init__(self, others: list[str], device: torch.device) -> None:
        self.names = ["loss", "denoise", "grad_norm", *others]
        n = len(self.names)
        # per-step sums, then steps and skipped steps, then loss and count of each t-bin
        self.sums = torch.zeros(n + 2 + 2 * T_BINS, dtype=torch.float64, device=device)
        # constants lie on the device from the start: giving it a number makes the host wait
        self._bins = torch.arange(T_BINS, device=device)
        self._one_step = torch.tensor([1.0, 0.0], dtype=torch.float64, device=device)
        self._skipped_step = torch.zeros_like(self.sums)
        self._skipped_step[n + 1] = 1
        self.bad_run = torch.zeros((), dtype=torch.int64, device=device)

    def state(self, world: World) -> dict:
        """Return plain numbers to save: the sums of each process, and the bad run."""
        return {"sums": world.gather(self.sums).tolist(), "bad_run": int(self.bad_run)}

    def load_state(self, state: dict, world: World) -> None:
        """Resume from `state`; after a change of world size the first process takes the total.

        Per-step sums are means over a process's images, so their total grows with the number of
        processes and is rescaled; the t-bins count images.
        """
        sums = torch.tensor(state["sums"], dtype=torch.float64)
        if sums.ndim != 2 or sums.shape[1:] != self.sums.shape or not sums.isfinite().all():
            raise ValueError(
                f"sums of metrics are {tuple(sums.shape)}, expected finite ones, a row for each "
                f"process and {len(self.sums)} numbers in it"
            )
        if type(state["bad_run"]) is not int or not 0 <= state["bad_run"] < 2**31:
            raise ValueError(f"bad_run is {short(state['bad_run'])}, expected a number of steps")
        if len(sums) == world.size:
            own = sums[world.rank]
        else:
            own = sums.sum(0) if world.is_main else torch.zeros_like(sums[0])
            own[: -2 * T_BINS] *= world.size / len(sums)
        self.sums.copy_(own)
        self.bad_run.fill_(state["bad_run"])

    def add(
        self, values: StepValues, norm: torch.Tensor, bad: torch.Tensor, t: torch.Tensor
    ) -> None:
        """Add one step: norm of its gradient, `bad` 1 if skipped, both 0-d, and t (local batch)."""
        member = (t * T_BINS).long().clamp(max=T_BINS - 1)[:, None] == self._bins
        member = member.double()
        means = torch.stack([values.loss, values.denoise, norm])
        by_t = (member * values.each.double()[:, None]).sum(0)
        parts = [means.double(), values.others.double(), self._one_step, by_t, member.sum(0)]
        step = torch.cat(parts)
        self.sums += torch.where(bad > 0, self._skipped_step, step)
        self.bad_run.add_(1).mul_(bad > 0)

    def read(self, world: World) -> dict[str, float | int | list[float | None]]:
        """Return means over steps and processes since the last reading; reset. Reads the device."""
        sums = world.sum(self.sums.clone()).tolist()
        self.sums.zero_()
        n = len(self.names)
        steps, skipped = sums[n : n + 2]
        means = {name: sums[i] / steps if steps else None for i, name in enumerate(self.names)}
        bins = zip(sums[n + 2 : -T_BINS], sums[-T_BINS:], strict=True)
        by_t = [total / count if count else None for total, count in bins]
        return {**means, "loss_by_t": by_t, "skipped": round(skipped / world.size)}
