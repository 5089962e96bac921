"""Features of images that arrive in batches, on one process or several: moments, and rows."""

import numpy as np
import torch
import torch.nn.functional as F

from repa_fast.distributed import World

SHOWN = 6


class Moments:
    """Mean and covariance of rows of width F, in fp64, without holding the rows.

    Count, mean m and scatter matrix sum (x - m)(x - m)^T of two sets of rows give those of both
    (Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
    variances"), whose order and sizes matter only to rounding.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, rows: torch.Tensor) -> None:
        """Take in rows (B, F) of any floating dtype; does not wait for the device.

        Raises:
            ValueError: another width.
        """
        _expect_rows(rows, len(self.mean))
        if not len(rows):
            return
        rows = rows.to(self.mean)
        mean = rows.mean(0)
        centred, shift, total = rows - mean, mean - self.mean, self.count + len(rows)
        self.scatter += centred.T @ centred
        self.scatter += torch.outer(shift, shift) * (self.count * len(rows) / total)
        self.mean += shift * (len(rows) / total)
        self.count = total

    def reduce(self, world: World) -> None:
        """Take in the rows of all processes; every one calls it, once, and has the whole then."""
        total = int(world.sum(torch.tensor(self.count)))
        mean = world.sum(self.mean * (self.count / max(total, 1)))
        shift = self.mean - mean
        self.scatter = world.sum(self.scatter + self.count * torch.outer(shift, shift))
        self.count, self.mean = total, mean

    def statistics(self, at_least: int = 2) -> tuple[np.ndarray, np.ndarray]:
        """Return mean (F) and unbiased covariance (F, F), fp64, as for `scores.frechet_distance`.

        Raises:
            ValueError: fewer than `at_least` rows, or than two; or a row that is not finite.
        """
        if self.count < max(at_least, 2):
            raise ValueError(f"there are {self.count} images, expected at least {max(at_least, 2)}")
        if not (self.mean.isfinite().all() and self.scatter.isfinite().all()):
            raise ValueError(f"features of {self.count} images are not all finite")
        return self.mean.cpu().numpy(), (self.scatter / (self.count - 1)).cpu().numpy()


class Rows:
    """Rows (width F) kept on `device`, each with the index of its image among all processes'."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self._index = [torch.empty(0, dtype=torch.int64, device=device)]
        self._rows = [torch.empty(0, width, device=device)]

    def add(self, index: torch.Tensor, rows: torch.Tensor) -> None:
        """Keep rows (B, F), in fp32, of the images `index`, int64 (B), in any order.

        Raises:
            ValueError: another width, or not one index per row.
        """
        _expect_rows(rows, self._rows[0].shape[1])
        if index.shape != rows.shape[:1]:
            raise ValueError(f"index has shape {tuple(index.shape)}, expected ({len(rows)},)")
        self._index.append(index.to(self._index[0]))
        self._rows.append(rows.to(self._rows[0]))

    def gather(self, count: int, world: World) -> torch.Tensor:
        """Return the rows of images 0 to count - 1, fp32 (count, F); every process calls it.

        Images from `count` on, which fill up a last batch, are left out.

        Raises:
            ValueError: an image is missing, or there twice; names them.
        """
        index, rows = torch.cat(self._index), torch.cat(self._rows)
        padding = int(world.max(torch.tensor(len(index)))) - len(index)
        index = world.gather(F.pad(index, (0, padding), value=count)).flatten()
        rows = world.gather(F.pad(rows, (0, 0, 0, padding))).flatten(0, 1)
        asked = (index >= 0) & (index < count)
        index = index[asked]
        seen = torch.bincount(index, minlength=count)
        if not (seen == 1).all():
            missing, repeated = (of.nonzero().flatten().tolist() for of in (seen == 0, seen > 1))
            raise ValueError(
                f"expected images 0 to {count - 1} once each; {len(missing)} are missing "
                f"{missing[:SHOWN]}, {len(repeated)} are repeated {repeated[:SHOWN]}"
            )
        whole = rows.new_empty(count, rows.shape[1])
        whole[index] = rows[asked]
        return whole


def _expect_rows(rows: torch.Tensor, width: int) -> None:
    if rows.ndim != 2 or rows.shape[1] != width or not rows.is_floating_point():
        raise ValueError(
            f"features are {rows.dtype} {tuple(rows.shape)}, expected floating point (B, {width})"
        )
