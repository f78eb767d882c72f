"""A table in a notebook: nothing is cut, and numbers look as a person writes them."""

import re
from typing import Any

import pandas
import pytest

from forgekit.table import NUMBER, TEXT, Table, write_value

LONG = "Turn this order into JSON: six boxes of honey go to Grace in Oslo by Friday, please."


def read_cells(table: Table) -> list[list[str]]:
    """The table's HTML as rows of texts, the head first."""
    rows = re.findall(r"<tr>(.*?)</tr>", table._repr_html_(), re.S)
    return [re.findall(r"<t[hd] [^>]*>(.*?)</t[hd]>", row, re.S) for row in rows]


def test_long_texts_are_shown_whole() -> None:
    frame = pandas.DataFrame({"question": [LONG]})
    assert LONG not in frame._repr_html_()  # what pandas does
    assert read_cells(Table(frame)) == [["question"], [LONG]]


def test_named_rows_stand_in_the_first_column_and_counted_ones_do_not() -> None:
    frame = pandas.DataFrame({"setting": ["a", "b"], "value": [1, 2]})
    assert read_cells(Table(frame))[1] == ["a", "1"]
    assert read_cells(Table(frame.set_index("setting"))) == [["setting", "value"], ["a", "1"], ["b", "2"]]
    assert read_cells(Table(pandas.DataFrame({"x": [1.5]}, index=["loss"]))) == [["", "x"], ["loss", "1.5"]]


def test_text_is_escaped() -> None:
    assert read_cells(Table({"a": ["<b>&"]}))[1] == ["&lt;b&gt;&amp;"]


def test_numbers_are_aligned_right_and_mixed_columns_left() -> None:
    styles = re.findall("<td style='(.*?)'>", Table({"a": [1.5], "b": ["x"], "c": [True]})._repr_html_())
    assert styles == [NUMBER, TEXT, TEXT]


def test_a_table_computes_as_pandas_does() -> None:
    assert Table({"a": [1, 2]})["a"].sum() == 3
    assert Table({"a": [1]}).to_dict("records") == [{"a": 1}]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (100.0, "100"),
        (-3.861, "-3.861"),
        (2e-4, "0.0002"),
        (262400, "262400"),
        (("attention", "mlp"), "attention, mlp"),
        ({"mlp": 4, "laurel": 8}, "mlp: 4, laurel: 8"),
        (
            {"baseline-established": {}, "model-performance": {"margin": 0.2}},
            "baseline-established, model-performance: {margin: 0.2}",
        ),
        ({}, ""),
        (None, ""),
        (False, "false"),
        ("as it is", "as it is"),
    ],
)
def test_values_look_as_a_person_writes_them(value: Any, text: str) -> None:
    assert write_value(value) == text
