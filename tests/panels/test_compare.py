"""ComparePanel: filters, pages, media, and what stands in its place without a front end."""

from typing import Any

import pytest

from forgekit.errors import DataError
from forgekit.evaluate.scores import Scores
from forgekit.panels.compare import ComparePanel


def make_scores(predictions: list[str], name: str = "q") -> Scores:
    rows = [
        {"question": f"{name}{i}", "reference": f"a{i}", "prediction": text, "right": text == f"a{i}"}
        for i, text in enumerate(predictions)
    ]
    return Scores(sum(row["right"] for row in rows) / len(rows), 0.5, 10, 1.0, rows)


# 12 rows: the first two right before and after, the next two become wrong, the others go from wrong to right but the last
BEFORE = [f"a{i}" for i in range(4)] + ["<no>"] * 8
AFTER = ["a0", "a1", "x", "y", *[f"a{i}" for i in range(4, 11)], "<no>"]
CHOSEN = {"all": list(range(12)), "wrong": [2, 3, 11], "changed": list(range(2, 11)), "right": [0, 1, *range(4, 11)]}


@pytest.fixture
def panel() -> Any:
    panel = ComparePanel(make_scores(BEFORE), make_scores(AFTER))
    assert panel.box
    return panel


@pytest.mark.parametrize("name", CHOSEN)
def test_a_filter_shows_its_rows_page_by_page(panel: Any, name: str) -> None:
    w, rows = panel.widgets, CHOSEN[name]
    w.choice.value = name
    assert {value: label for label, value in w.choice.options}[name] == f"{name} ({len(rows)})"
    shown: list[int] = []
    for first in range(0, len(rows), 5):
        assert f"{first + 1} to {min(first + 5, len(rows))} of {len(rows)}" in w.place.value
        assert w.back.disabled is (first == 0)
        assert panel.rows() == [i for i in rows if f">q{i}</td>" in w.table.value]
        shown += panel.rows()
        w.forth.click()
    assert shown == rows and w.forth.disabled


def test_verdicts_are_words_and_answers_are_escaped(panel: Any) -> None:
    panel.widgets.choice.value = "wrong"
    assert "x\n(wrong)" in panel.widgets.table.value and "a2\n(right)" in panel.widgets.table.value
    assert "&lt;no&gt;\n(wrong)" in panel.widgets.table.value and "<no>" not in panel.widgets.table.value


def test_an_empty_filter_says_so() -> None:
    panel = ComparePanel(make_scores(["a0"]), make_scores(["a0"]))
    assert panel.box
    panel.widgets.choice.value = "wrong"
    assert "no such answer" in panel.widgets.place.value and panel.widgets.table.value == ""
    assert panel.widgets.back.disabled and panel.widgets.forth.disabled


def test_questions_come_with_their_media() -> None:
    from PIL import Image

    content = [{"type": "image", "image": Image.new("RGB", (9, 7))}, {"type": "text", "text": "q0"}]
    data: Any = [{"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": []}]}]
    panel = ComparePanel(make_scores(["no"]), make_scores(["a0"]), data)
    assert "alt='picture, 9 x 7 pixels'" in panel.write_table([0])


def test_without_a_front_end_the_first_rows_stand_there_as_a_table(panel: Any) -> None:
    bundle = panel._repr_mimebundle_()
    assert bundle.keys() == {"text/plain", "text/html"}
    assert bundle["text/plain"].startswith("ComparePanel: 12 rows, 3 wrong, 9 changed, 9 right\n")
    assert "q4" in bundle["text/html"] and "q5" not in bundle["text/html"]


def test_scores_of_other_rows_are_refused() -> None:
    with pytest.raises(DataError, match="scores of different rows"):
        ComparePanel(make_scores(["a0"]), make_scores(["a0"], name="other"))
