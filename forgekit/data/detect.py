"""Which format rows have: a sample is looked at, and the finding is said, with converted rows to check it by."""

from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .clean import BadRow, make_printable
from .formats import FORMATS, ToExample, list_columns, make_conversion
from .messages import Messages, check_example

if TYPE_CHECKING:
    from ..config import Config

SHOWN = 3  # converted rows shown
WIDTH = 100  # characters of a line


def find_format(config: "Config", sample: list[dict[str, Any]]) -> ToExample:
    """Return the conversion that data.template or data.format names, or that the first rows fit; say which and why.

    Raises DataError when no format fits, or when the rows lack a column of the template.
    """
    data = config.data
    name: str = "template" if data.template else data.format
    if name == "template" and not data.template:
        raise DataError("data.format is template, and data.template is empty. Write the template there.")
    found = [make_printable(str(column)) for column in dict.fromkeys(column for row in sample for column in row)]
    if data.template:
        missing = [choices[0] for choices in list_columns(name, data) if choices[0] not in found]
        if missing:
            raise DataError(
                f"data.template names the column {missing[0]!r}, which no row has. They have: {', '.join(found)}."
            )
        why = "as data.template is set"
    elif name == "auto":
        name = detect_format(sample)
        needed = ", ".join("/".join(c for c in choices if c in found) for choices in list_columns(name, data))
        fitting = sum(FORMATS[name].fits(row) for row in sample)
        why = f"as {fitting} of the first {len(sample)} rows have the columns {needed}"
    else:
        why = "as data.format says"
    print(f"Format: {name}, {why}. Another one: data.format, data.template, or to_example(row). Converted:")
    to_example = make_conversion(name, data)
    for line in show_rows(sample, to_example):
        print(line)
    return to_example


def detect_format(rows: list[dict[str, Any]]) -> str:
    """Return the name of the format whose columns most rows of the sample have, if that is more than half of them.

    The others are set aside later, each with its reason. Raises DataError naming the columns when no format fits.
    """
    fitting = {name: sum(format.fits(row) for row in rows) for name, format in FORMATS.items()}
    best = max(fitting, key=lambda name: fitting[name])
    if 2 * fitting[best] > len(rows):
        return best
    found = ", ".join(sorted({make_printable(str(key)) for row in rows for key in row})) or "none"
    known = "; ".join(
        f"{name}: {', '.join('/'.join(choices) for choices in format.columns)}" for name, format in FORMATS.items()
    )
    raise DataError(
        f"The rows' columns ({found}) fit no known format ({known}). "
        "Define to_example(row) in the notebook, which returns {'messages': [...]}, or set data.template."
    )


def show_rows(sample: list[dict[str, Any]], to_example: ToExample) -> list[str]:
    """Return the first rows that can be converted, one line a turn."""
    lines: list[str] = []
    shown = 0
    for row in sample:
        try:
            messages = check_example(to_example(row))
        except (BadRow, RecursionError):
            continue  # it is set aside later, with its place
        shown += 1
        lines += [shorten(f"  {shown} {line}") for line in show_turns(messages)]
        if shown == SHOWN:
            break
    return lines


def show_turns(messages: Messages) -> list[str]:
    """Return one line a turn; a medium is its kind in brackets."""
    return [
        f"{turn['role']}: "
        + " ".join(part["text"] if part["type"] == "text" else f"[{part['type']}]" for part in turn["content"])
        for turn in messages
    ]


def shorten(line: str) -> str:
    """Return a text on one line, cut behind 100 characters."""
    line = "  " + " ".join(line[: 4 * WIDTH].split())
    return line if len(line) <= WIDTH else line[: WIDTH - 4] + " ..."
