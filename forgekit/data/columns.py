"""CSV and TSV files with a header line: columns counted in every line, separators other than the comma found and said."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError
from .clean import BadRow
from .lines import Line

SEPARATORS = ",;\t|"  # the first wins where several give as many columns
LONGEST = 16 << 20  # characters of one field; behind a quote that is not closed the rest of the file is one field


def read_csv(file: BinaryIO, path: Path) -> Iterator[Line]:
    """Yield (line number, row or what is wrong, its JSON); a row that spans lines counts as its last one.

    A quote that is not closed swallows lines: each of them is yielded as a bad row, so that the loss shows.
    """
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="", errors="surrogateescape")
    separator = find_separator(text, path)
    reader = csv.reader(text, delimiter=separator, strict=True)
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            bad = BadRow("broken_csv", f"{error}; a quote that opens on line {first} may not be closed")
            yield from ((number, bad, "") for number in range(first, reader.line_num + 1))
            continue
        if header is None:
            header = check_header(values, path)
        elif values:
            row = check_values(header, values)
            yield reader.line_num, row, json.dumps(row) if isinstance(row, dict) else ""
    text.detach()  # the file is its opener's to close


def find_separator(text: io.TextIOWrapper, path: Path) -> str:
    """Return what separates columns: a tab in .tsv; else what gives the header line most columns, said when no comma.

    csv.Sniffer also looks at the rows, where commas and semicolons of plain sentences mislead it.
    """
    if path.suffix.lower() == ".tsv":
        return "\t"
    start = text.tell()
    line = text.readline(LONGEST)
    text.seek(start)
    try:
        found = max(SEPARATORS, key=lambda separator: len(next(csv.reader([line], delimiter=separator), [])))
    except csv.Error:
        return ","
    if found != ",":
        print(f"{path.name}: the columns are separated by {found!r}, as its header line shows.")
    return found


def check_header(header: list[str], path: Path) -> list[str]:
    """Return the column names. Raises DataError when one stands twice, because one of the two would be lost."""
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path}:1: the column {twice[0]!r} stands twice in the header. Rename one of the two.")
    return header


def check_values(header: list[str], values: list[str]) -> dict[str, Any] | BadRow:
    """Return the row, or what is wrong with it."""
    if len(values) != len(header):
        return BadRow("wrong_columns", f"the header has {len(header)} columns, this line has {len(values)}")
    if any(0xDC80 <= ord(letter) <= 0xDCFF for value in values for letter in value if letter > "\x7f"):
        return BadRow("not_utf8", "bytes that are not UTF-8")
    return dict(zip(header, values, strict=True))
