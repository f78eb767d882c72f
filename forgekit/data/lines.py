"""JSON lines and JSON lists: every line is a row, or is named with what is wrong with it.

Read here and not by a library's reader, which stops at the first bad line or guesses a common schema and so loses rows
without a word.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError
from .clean import BadRow

LONGEST = 64 << 20  # bytes of one line; a file of another kind without line ends would fill the memory
# what a reader yields: line number from 1, the row or what is wrong with it, and the row as JSON text
Line = tuple[int, dict[str, Any] | BadRow, str]


def read_json_lines(file: BinaryIO, path: Path) -> Iterator[Line]:
    """Yield each line's row; empty lines are passed over."""
    for number, line in enumerate(split_lines(file), 1):
        if isinstance(line, BadRow):
            yield number, line, ""
        elif line.strip(b"\xef\xbb\xbf \t\r\n"):
            yield number, *parse_row(line)


def split_lines(file: BinaryIO) -> Iterator[bytes | BadRow]:
    """Yield lines; one longer than 64 MiB is passed over without being held."""
    while line := file.readline(LONGEST):
        if len(line) < LONGEST or line.endswith(b"\n"):
            yield line
            continue
        length = len(line)
        while line and not line.endswith(b"\n"):
            line = file.readline(LONGEST)
            length += len(line)
        yield BadRow("line_too_long", f"a line of {length} bytes; at most {LONGEST} are read as one row")


def parse_row(line: bytes) -> tuple[dict[str, Any] | BadRow, str]:
    """Parse one line of JSON; return the row or why it is none, and the text."""
    try:
        text = line.decode("utf-8-sig").rstrip("\r\n")  # a cut line then names a column of its own, not of the next
    except UnicodeDecodeError as error:
        return BadRow("not_utf8", f"byte {error.start} is not UTF-8"), ""
    try:
        row = json.loads(text, object_pairs_hook=join_pairs)
    except json.JSONDecodeError as error:
        return BadRow("broken_json", f"no valid JSON: {error.msg} at column {error.colno}"), ""
    except RecursionError:
        return BadRow("too_deep", "lists or objects stand in each other too deeply to be read"), ""
    except BadRow as bad:
        return bad, ""
    except ValueError as error:  # a number of 5000 digits
        return BadRow("broken_json", f"no valid JSON: {error}"), ""
    return check_object(row), text


def join_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of unique keys. Raises BadRow when one stands twice: JSON readers keep the last without a word."""
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRow(
            "duplicate_key", f"the key {twice[:80]!r} stands twice in one object; one of the values would be lost"
        )
    return row


def check_object(row: Any) -> dict[str, Any] | BadRow:
    """Return the row, or that it is none."""
    return (
        row
        if isinstance(row, dict)
        else BadRow("not_an_object", f"a row is a JSON object, this is a {type(row).__name__}")
    )


def read_json(file: BinaryIO, path: Path) -> Iterator[Line]:
    """Yield the rows of a file that holds one JSON list, numbered from 1; a file of JSON lines under this ending works too.

    A list is read whole, so it takes a multiple of its size in memory; JSON lines do not.
    Raises DataError for a list that breaks off or is broken: where a row of it ends can then only be guessed.
    """
    data = file.read()
    try:
        rows = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            where = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise DataError(
                f"{path}{where}: the JSON list is broken: {error}. Mend that line, or write one row on each line."
            ) from None
        file.seek(0)
        yield from read_json_lines(file, path)
        return
    if isinstance(rows, dict):  # one row alone: as a line, so that a key that stands twice shows
        yield 1, *parse_row(data)
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield number, check_object(row), json.dumps(row)
