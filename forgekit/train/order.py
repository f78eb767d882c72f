"""Which row is learned from when, and with which random numbers: decided by (seed, epoch) and (seed, epoch, row) alone.

Nothing that happened before takes part, so a resumed training meets the same rows in the same order, and whatever a row's
conversion draws at random (a crop, a speed) comes out the same; training's own random numbers (dropout) are left untouched.
"""

from collections.abc import Iterator
from typing import Any

from ..data.randomness import own_random_numbers
from ..faults import strike


class Order:
    """A sampler: the numbers of all rows, shuffled anew in each epoch as transformers does it.

    transformers reaches the sampler's epoch through accelerate's loaders, which lose it where the first batches of an epoch are
    skipped; here `epoch` is set where an epoch begins.
    """

    def __init__(self, rows: int, seed: int):
        self.rows, self.seed, self.epoch = rows, seed, 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        return iter(self.shuffle(self.epoch))

    def shuffle(self, epoch: int) -> list[int]:
        """Return the order of an epoch."""
        import torch

        return torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()

    def find_rows(self, step: int, batch: int) -> list[int]:
        """Return the rows of an optimiser step.

        Args:
            step: counted from 0 over all epochs.
            batch: rows in one optimiser step, all its accumulated batches together.
        """
        epoch, place = divmod(step, -(-self.rows // batch))
        return self.shuffle(epoch)[place * batch : (place + 1) * batch]


class SeededRows:
    """A data set whose rows are read with random numbers of their own."""

    def __init__(self, rows: Any, order: Order):
        self.rows, self.order = rows, order

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        if number < 0:
            from .share import Blank

            return Blank(self[-1 - number])
        with own_random_numbers(self.order.seed, self.order.epoch, number):
            strike("row")
            return self.rows[number]
