"""A pandas table that a notebook shows whole: texts uncut and aligned left, numbers short and aligned right."""

import html
from collections.abc import Iterable, Mapping
from numbers import Number
from typing import Any

import pandas

TEXT, NUMBER = "text-align:left;vertical-align:top;white-space:pre-wrap", "text-align:right;vertical-align:top"


class Table(pandas.DataFrame):
    """A DataFrame like any other but for its HTML: pandas cuts texts at 50 characters, JupyterLab aligns them right.

    What is computed from it is a plain DataFrame.
    """

    def _repr_html_(self) -> str:
        frame = pandas.DataFrame(self)
        if not isinstance(frame.index, pandas.RangeIndex):  # which counts the rows and says nothing about them
            frame = frame.reset_index(names=frame.index.name or "")
        styles = [choose_style(frame[name]) for name in frame]
        head = write_row("th", frame.columns, styles)
        body = "".join(write_row("td", values, styles) for values in frame.itertuples(index=False))
        return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def choose_style(values: Iterable[Any]) -> str:
    """Return the style of a column: numbers when it holds nothing else. True and false are words here."""
    numbers = all(isinstance(value, Number) and not isinstance(value, bool) for value in values)
    return NUMBER if numbers else TEXT


def write_row(tag: str, values: Iterable[Any], styles: list[str]) -> str:
    """Return one row as HTML."""
    cells = [f"<{tag} style='{style}'>{write_html(value)}</{tag}>" for value, style in zip(values, styles, strict=True)]
    return f"<tr>{''.join(cells)}</tr>"


def write_html(value: Any) -> str:
    """Return what a value shows in a notebook: its own HTML, or its text."""
    return value._repr_html_() if hasattr(type(value), "_repr_html_") else html.escape(write_value(value))


def write_value(value: Any) -> str:
    """Return a value as a person writes it: 100 instead of 100.000, names with commas, nothing for None.

    {"a": {}, "b": {"margin": 0.2}} becomes: a, b: {margin: 0.2}
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return ", ".join(map(write_value, value))
    if isinstance(value, Mapping):
        return ", ".join(write_item(key, item) for key, item in value.items())
    return "" if value is None else str(value)


def write_item(key: Any, item: Any) -> str:
    """Return one item of a mapping; a name alone when nothing stands behind it."""
    if isinstance(item, Mapping):
        return f"{key}: {{{write_value(item)}}}" if item else str(key)
    return f"{key}: {write_value(item)}"
