"""The rows of one source on their way in: each is seen once, in order, and what is kept of them ends as a table.

Lines of text become one JSON text in a column, so that rows need not share a schema:

    {"json": '{"prompt": "...", "completion": "..."}', "source": "orders.jsonl:12"}

Tables of columns stay as they are, and only the numbers of the good rows are kept. Neither grows in memory with the file.
"""

import atexit
import json
import os
import platform
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import DataError
from .clean import BadRow, Quarantine
from .lines import Line

if TYPE_CHECKING:
    import numpy
    from datasets import Dataset

Row = tuple[str, Any, Any]  # place (file:line); the row, or a BadRow; what `keep` takes to keep it
Decode = Callable[[Mapping[str, list[Any]]], list[Any]]  # a batch of the table's columns -> rows
IN_MEMORY = 64 << 20  # bytes; smaller files are kept in memory, larger ones on disk
BATCH = 256  # rows read from a table together


@dataclass
class Kept:
    """Good rows: a table, how its batches become rows again, where they came from, and a hash of each."""

    table: "Dataset"
    decode: Decode
    places: Callable[[Sequence[int]], list[str]]  # numbers in the table -> file:line
    folder: Path | None = None  # relative paths of media start here
    prompts: "numpy.ndarray" = None  # type: ignore[assignment]  # S16 each, of the turns before the first answer
    contents: "numpy.ndarray" = None  # type: ignore[assignment]  # S16 each, of the whole row


class TableRows:
    """Rows that stand in a table of columns already, or in a list in memory."""

    def __init__(self, name: str, table: "Dataset", decode: Decode | None = None):
        self.name, self.table, self.decode = name, table, decode or decode_columns
        self.folder: Path | None = None
        self.kept = array("q")

    @classmethod
    def from_list(cls, name: str, rows: Sequence[Any]) -> "TableRows":
        """Rows in memory stay there as they are: a table of their numbers stands for them."""
        from datasets import Dataset

        def look_up(batch: Mapping[str, list[Any]]) -> list[Any]:
            return [rows[number] for number in batch["row"]]

        return cls(name, Dataset.from_dict({"row": range(len(rows))}), look_up)

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self.table), BATCH):
            for number, row in enumerate(self.decode(self.table[start : start + BATCH]), start):
                wrong = BadRow("not_an_object", f"a row is a dict of columns, this is a {type(row).__name__}")
                yield f"{self.name}:{number + 1}", row if isinstance(row, Mapping) else wrong, number

    def share(self, done: int) -> float:
        """Return which share of the source is read."""
        return done / len(self.table)

    def progress(self, done: int) -> str:
        """Say how far the reading is."""
        return f"{done} of {len(self.table)} rows"

    def keep(self, key: int) -> None:
        """Keep a row."""
        self.kept.append(key)

    def finish(self) -> Kept:
        """Return what was kept."""
        import numpy

        numbers = numpy.array(self.kept, dtype=numpy.int64)
        table = self.table if len(numbers) == len(self.table) else self.table.select(numbers)
        return Kept(table, self.decode, lambda rows: [f"{self.name}:{numbers[i] + 1}" for i in rows], self.folder)


def decode_columns(batch: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Turn a batch of columns back into rows."""
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def decode_json(batch: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Turn a batch of JSON texts back into rows."""
    return [json.loads(text) for text in batch["json"]]


@dataclass
class TextRows:
    """Rows that are read from lines of text."""

    path: Path
    reader: Callable[[BinaryIO, Path], Iterator[Line]]
    folder: Path | None = None
    _texts: list[str] = field(default_factory=list)
    _places: list[str] = field(default_factory=list)
    _read: int = 0

    def __post_init__(self) -> None:
        self.size = self.path.stat().st_size
        self.store = Store(self.size)

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows. Raises DataError when not one line can be read as a row, naming why."""
        wrong = Quarantine()
        readable = False
        try:
            with open(self.path, "rb") as file:
                for number, row, text in self.reader(file, self.path):
                    place = f"{self.path.name}:{number}"
                    if isinstance(row, BadRow) and not readable:
                        wrong.add(place, row)
                    readable |= not isinstance(row, BadRow)
                    self._read = file.tell() if not file.closed else self.size
                    yield place, row, (text, place)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}.") from error
        if not readable:
            raise DataError(f"{self.path} holds no row that can be read.{wrong.describe()}")

    def share(self, done: int) -> float:
        """Return which share of the source is read."""
        return min(1.0, self._read / max(1, self.size))

    def progress(self, done: int) -> str:
        """Say how far the reading is."""
        return f"{done} rows, {self.share(done):.0%} of {self.path.name}"

    def keep(self, key: tuple[str, str]) -> None:
        """Keep a row."""
        self._texts.append(key[0])
        self._places.append(key[1])
        if len(self._texts) == BATCH:
            self.store.write(self._texts, self._places)
            self._texts, self._places = [], []

    def finish(self) -> Kept:
        """Return what was kept."""
        self.store.write(self._texts, self._places)
        table = self.store.finish()
        return Kept(table, decode_json, lambda rows: table[list(rows)]["source"], self.folder)


class Store:
    """An Arrow table that is written row by row: in memory when small, else in a file that lives as long as the process.

    The file stands in the folder that `datasets` uses for its own (HF_DATASETS_CACHE), which is usually on a large disk.
    """

    def __init__(self, size: int):
        import pyarrow

        self.schema = pyarrow.schema({"json": pyarrow.large_string(), "source": pyarrow.string()})
        self.path = make_scratch() / "rows.arrow" if size > IN_MEMORY else None
        self.sink = pyarrow.OSFile(str(self.path), "wb") if self.path else pyarrow.BufferOutputStream()
        self.writer = pyarrow.ipc.new_stream(self.sink, self.schema)

    def write(self, texts: list[str], places: list[str]) -> None:
        """Write rows."""
        import pyarrow

        if texts:
            columns = [pyarrow.array(texts, pyarrow.large_string()), pyarrow.array(places)]
            self.writer.write_batch(pyarrow.record_batch(columns, schema=self.schema))

    def finish(self) -> "Dataset":
        """Return the table."""
        from datasets import Dataset

        self.writer.close()
        if self.path:
            self.sink.close()
            return Dataset.from_file(str(self.path))
        return Dataset.from_buffer(self.sink.getvalue())


def make_scratch() -> Path:
    """Make a folder that is removed when this process ends, or by a later one when it was killed."""
    import datasets

    root = Path(datasets.config.HF_DATASETS_CACHE)
    root.mkdir(parents=True, exist_ok=True)
    mine, owner = f"forgekit-{platform.node()}-", os.getpid()
    remove_left(root, mine)
    folder = Path(tempfile.mkdtemp(prefix=f"{mine}{owner}-", dir=root))

    def remove() -> None:
        if os.getpid() == owner:  # a forked worker ends earlier than the process that reads the rows
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def remove_left(root: Path, mine: str) -> None:
    """Remove what processes of this machine left that are gone."""
    import psutil

    for folder in root.glob(f"{mine}*"):
        owner = folder.name.removeprefix(mine).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)
