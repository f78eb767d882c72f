"""Bad rows cost a line in a report, not a run: each is set aside with its place, a reason code and a sentence."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError
from ..run_folder import write_text


class BadRow(Exception):
    """A row that cannot be learned from: `code` to count by, `reason` to read."""

    def __init__(self, code: str, reason: str):
        super().__init__(reason)
        self.code, self.reason = code, reason


@dataclass
class Quarantine:
    """The rows set aside; kept + quarantined = seen, always."""

    seen: int = 0
    rows: list[dict[str, str]] = field(default_factory=list)

    def add(self, source: str, bad: BadRow) -> None:
        """Set a row aside. `source` is file:line."""
        self.rows.append({"source": source, "code": bad.code, "reason": bad.reason})

    def describe(self, most: int = 3) -> str:
        """Return the most frequent reasons, each with its first place, as one sentence; empty when nothing is set aside."""
        counts = Counter(row["code"] for row in self.rows).most_common(most)
        first = {row["code"]: row for row in reversed(self.rows)}
        parts = [
            f"{count} x {code} (first: {first[code]['source']}: {first[code]['reason']})" for code, count in counts
        ]
        return " " + "; ".join(parts) + "." if parts else ""

    def check(self, limit: float) -> None:
        """Raise DataError when a larger share than `limit` of the rows seen is bad."""
        if self.rows and len(self.rows) > limit * self.seen:
            raise DataError(
                f"{len(self.rows)} of {self.seen} rows cannot be learned from, more than data.max_bad = {limit:g} allows:"
                f"{self.describe()} Mend the rows, or raise data.max_bad to go on without them."
            )

    def write(self, path: Path) -> None:
        """Write the rows set aside as JSON lines."""
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))
