"""Which rows of an optimiser step each of several processes learns from; the rows of a step do not depend on their number.

    a step of 8 rows, 2 at once      alone            0 1 | 2 3 | 4 5 | 6 7
                                     two processes    0 1 | 4 5              first
                                                      2 3 | 6 7              second

An epoch's last batches rarely divide by the number of processes: then some compute a row that teaches nothing.
"""

from collections.abc import Callable, Iterator
from typing import Any

from ..data.collate import IGNORE
from ..errors import ConfigError
from .order import Order


class Share:
    """A sampler: the rows of one process. Batch k of an epoch goes to process k modulo their number.

    A negative number, -1 - row, is a row that is read and teaches nothing (`Blank`).
    """

    def __init__(self, order: Order, batch: int, rank: int, processes: int):
        self.order, self.batch, self.rank, self.processes = order, batch, rank, processes

    def __len__(self) -> int:
        batches = -(-len(self.order) // self.batch)
        last = self.rank + (-(-batches // self.processes) - 1) * self.processes  # number of this process's last batch
        before = (last - self.rank) // self.processes * self.batch
        return before + (1 if last >= batches else min(self.batch, len(self.order) - last * self.batch))

    def __iter__(self) -> Iterator[int]:
        rows = self.order.shuffle(self.order.epoch)
        batches = -(-len(rows) // self.batch)
        for number in range(self.rank, -(-batches // self.processes) * self.processes, self.processes):
            yield from rows[number * self.batch : (number + 1) * self.batch] or [-1 - rows[0]]


class Blank(dict[str, Any]):
    """A row of which nothing is learned: it fills up a round of batches, so that every process takes the same steps."""


def collate_shared(collate: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]:
    """Return a collator that leaves blank rows without a label."""

    def collate_rows(examples: list[Any]) -> dict[str, Any]:
        batch = collate(examples)
        for place, example in enumerate(examples):
            if isinstance(example, Blank):
                batch["labels"][place] = IGNORE
        return batch

    return collate_rows


def split_batch(rows: int, accumulated: int, processes: int) -> tuple[int, int]:
    """Return the rows at once of each process, and how many such batches make a step, over all processes together.

    Their product stays, and each process gets as many batches; rows at once stay where that is possible, which makes the batches
    the very same ones. Raises ConfigError when a step's rows cannot be shared evenly.
    """
    step = rows * accumulated
    if step % processes:
        near = ", ".join(str(number) for number in range(2, min(step, 16) + 1) if step % number == 0) or "1"
        raise ConfigError(
            f"train.gpus: {processes} processes cannot share the {step} rows of an optimiser step (train.per_device_train_batch_size "
            f"{rows} x train.gradient_accumulation_steps {accumulated}) evenly. Take {near} of them, or change one of the two."
        )
    small = max(size for size in range(1, rows + 1) if step % (size * processes) == 0)
    return small, step // small
