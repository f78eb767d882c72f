"""The batches of the next step, collated in a thread while the GPU computes this one: a picture's pixels take longer than reading it.

    training's thread   forward, backward of a batch | reads the rows of a later one |  ...  | waits | optimiser, log, checkpoint, scores
    the other one                                    | collates them: tokens, pixels, spectra        |

Rows are read by training's own thread, one by one, in the order and with the random numbers that they have without this, and
the other thread rests while anything else than batches is computed: a training's numbers do not depend on who was faster. A training
that ends, in whatever way, closes it.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from .order import SeededRows


class ReadAhead:
    """A data set that hands out collated batches; `take` is the collator of its loader.

    rows: read by their numbers. collate: makes a batch of some. order: the numbers of an epoch, as the loader's sampler gives them.
    size: rows of a batch.
    """

    def __init__(self, rows: SeededRows, collate: Callable[[list[Any]], Any], order: Iterable[int], size: int):
        self.rows, self.collate, self.order, self.size = rows, collate, order, size
        self.numbers: list[int] = []
        self.place = 0  # in `numbers`, behind the batch that was handed out last
        self.ready: dict[tuple[int, ...], Future[Any]] = {}
        self.thread: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, numbers: list[int]) -> Any:
        """Return the batch of these rows; an error that reading ahead met is raised here."""
        if self.numbers[self.place : self.place + self.size] != numbers:
            # another epoch, or a resumed one, whose first batches the loader passes by
            self.numbers, self.ready = list(self.order), {}
            starts = range(0, len(self.numbers), self.size)
            found = (start for start in starts if self.numbers[start : start + self.size] == numbers)
            self.place = next(found, len(self.numbers))
        self.place += self.size
        ready = self.ready.pop(tuple(numbers), None)
        return ready.result() if ready else self.collate([self.rows[number] for number in numbers])

    def start(self) -> None:
        """Read the rows of one batch more, and have them collated."""
        place = self.place + len(self.ready) * self.size
        numbers = self.numbers[place : place + self.size]
        if not numbers:
            return
        ready: Future[Any] = Future()
        try:
            rows = [self.rows[number] for number in numbers]
            self.thread = self.thread or ThreadPoolExecutor(1, "read-ahead")
            ready = self.thread.submit(self.collate, rows)
        except Exception as error:  # noqa: BLE001  not of this step: it is raised where the batch is asked for
            ready.set_exception(error)
        self.ready[tuple(numbers)] = ready

    def wait(self) -> None:
        """Wait until everything that was started is ready."""
        wait(self.ready.values())

    def close(self) -> None:
        """Drop what nobody will ask for, and end the thread; another batch begins another one."""
        thread, self.thread, self.ready = self.thread, None, {}
        if thread:
            thread.shutdown(wait=True, cancel_futures=True)


def take(batch: Any) -> Any:
    """Return a batch that is collated already."""
    return batch
