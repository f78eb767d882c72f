"""Bad rows cost a line in a report, not a run: each is set aside with its place, a reason code and a sentence."""

import json
import os
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ..errors import DataError
from ..files import open_whole

IN_MEMORY = 1 << 20  # bytes of rows set aside before they go to a temporary file: a whole file may be bad


class BadRow(Exception):
    """A row that cannot be learned from: `code` to count by, `reason` to read."""

    def __init__(self, code: str, reason: str):
        super().__init__(reason)
        self.code, self.reason = code, reason


def make_printable(text: str) -> str:
    """Return the text with half characters (lone surrogates) written as escapes: no file or terminal takes them."""
    return text.encode("utf-8", "backslashreplace").decode()


def open_spool() -> IO[str]:
    """Open a temporary file that stays in memory while it is small."""
    return tempfile.SpooledTemporaryFile(IN_MEMORY, "w+", encoding="utf-8")  # open as long as its owner


@dataclass
class Quarantine:
    """The rows set aside; kept + quarantined = seen, always."""

    seen: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # code -> place and reason of the first such row
    _lines: IO[str] = field(default_factory=open_spool, repr=False)

    def __post_init__(self) -> None:
        weakref.finalize(self, self._lines.close)

    def add(self, source: str, bad: BadRow) -> None:
        """Set a row aside. `source` is file:line."""
        row = {"source": make_printable(source), "code": bad.code, "reason": make_printable(bad.reason)}
        self.counts[bad.code] += 1
        self.first.setdefault(bad.code, f"{row['source']}: {row['reason']}")
        self._lines.write(json.dumps(row, ensure_ascii=False) + "\n")

    def __len__(self) -> int:
        return self.counts.total()

    @property
    def rows(self) -> list[dict[str, str]]:
        """The rows set aside, each with source, code and reason."""
        return [json.loads(line) for line in self.read_lines()]

    def read_lines(self) -> Iterator[str]:
        """Yield the rows set aside as lines of JSON."""
        self._lines.seek(0)
        yield from self._lines
        self._lines.seek(0, os.SEEK_END)

    def describe(self, most: int = 3) -> str:
        """Return the most frequent reasons, each with its first place, as one sentence; empty when nothing is set aside."""
        parts = [f"{count} x {code} (first: {self.first[code]})" for code, count in self.counts.most_common(most)]
        more = len(self.counts) - len(parts)
        return f" {'; '.join(parts)}{f'; and {more} other reasons' * (more > 0)}." if parts else ""

    def check(self, limit: float) -> None:
        """Raise DataError when a larger share than `limit` of the rows seen is bad."""
        if len(self) > limit * self.seen:
            raise DataError(
                f"{len(self)} of {self.seen} rows cannot be learned from, more than data.max_bad = {limit:g} allows:"
                f"{self.describe()} Mend the rows, or raise data.max_bad to go on without them."
            )

    def write(self, path: Path) -> None:
        """Write the rows set aside as JSON lines."""
        with open_whole(path) as file:
            file.writelines(self.read_lines())
