"""Sample order as a pure function of (seed, epoch, position)."""

import numpy as np


class Consecutive:
    """Given rows in order, `batch` at a time, the last fewer: one pass, by one process."""

    def __init__(self, rows: np.ndarray, batch: int) -> None:
        self._rows = rows
        self.batch = batch
        self.steps = -(-len(rows) // batch)

    def rows(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Return the row numbers of `step`, counted from 0, int64."""
        return self._rows[step * self.batch : (step + 1) * self.batch]


class SampleOrder:
    """A global shuffle per epoch, cut into global batches; the last partial batch is dropped.

    Args:
        num_rows: rows of the dataset.
        batch: images per step, over all processes.
        seed: non-negative.

    Raises:
        ValueError: the dataset has fewer rows than one batch.
    """

    def __init__(self, num_rows: int, batch: int, seed: int) -> None:
        if num_rows < batch:
            fits = 1 << max(num_rows.bit_length() - 1, 0)  # a power of two
            raise ValueError(
                f"the dataset has {num_rows} rows, expected at least a step's {batch}: "
                f"--batch-size {fits} fits"
            )
        self.num_rows = num_rows
        self.batch = batch
        self.seed = seed
        self.steps_per_epoch = num_rows // batch
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def rows(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Return the row numbers (batch / world_size) of `rank` at `step`, from 0, int64.

        Ranks take consecutive slices of the global batch, so the union over ranks depends on
        (seed, step) alone.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
            self._epoch = epoch
        local = self.batch // world_size
        start = position * self.batch + rank * local
        return self._permutation[start : start + local]
