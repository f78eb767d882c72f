"""Comparing two models: differences with intervals, the rows that changed most, and what a notebook shows."""

import pytest

from forgekit import Scores, compare_scores
from forgekit.errors import DataError

from .rows import answer_right, make_scores


def test_comparison_gives_both_scores_the_change_and_its_interval() -> None:
    before, after = (
        make_scores(answer_right(2, 40), losses=[2.5] * 40),
        make_scores(answer_right(30, 40), losses=[0.5] * 40),
    )
    found = compare_scores(before, after)
    table = found.table
    assert table.loc["exact match, %", ["before", "after", "change"]].tolist() == [5, 75, 70]
    assert table.loc["loss, nats a token", ["before", "after", "change"]].tolist() == [2.5, 0.5, -2]
    assert table.loc["rows", ["before", "after", "change"]].tolist() == [40, 40, 0]
    change = found.change
    assert (change.better, change.worse) == (28, 0) and change.p < 1e-6
    assert 0.5 < change.low < 0.7 < change.high < 0.9
    assert table.loc["exact match, %", "change, 95 %"] == f"{100 * change.low:+.1f} to {100 * change.high:+.1f}"


def test_of_errors_fewer_are_better() -> None:
    settings = {"evaluate.metric": "wer"}
    before = make_scores([("a b c d", "a x y d"), ("a b", "a b"), ("e f", "e g")], settings)
    after = make_scores([("a b c d", "a b c d"), ("a b", "x y"), ("e f", "e f")], settings)
    found = compare_scores(before, after)
    change = found.change
    assert (change.metric.name, change.before, change.after) == ("wer", 3 / 8, 2 / 8)
    assert change.gain == pytest.approx(1 / 8) and change.gain_bounds == (-change.high, -change.low)
    assert (change.better, change.worse) == (2, 1)
    assert (found.worst, found.best) == ([1], [0, 2])


def test_worst_and_best_rows_are_those_that_changed_most() -> None:
    settings = {"evaluate.metric": "token_f1"}
    words = "a b c d"
    before = make_scores([(words, words), (words, "a b"), (words, ""), (words, "a"), (words, words)], settings)
    after = make_scores([(words, "a b c"), (words, words), (words, words), (words, "a"), (words, "")], settings)
    found = compare_scores(before, after)
    assert (found.worst, found.best) == ([4, 0], [2, 1])
    shown = found.extremes
    assert shown["row"].tolist() == [5, 1, 3, 2]
    assert shown["became"].tolist() == ["worse, -100.0", "worse, -14.3", "better, +100.0", "better, +33.3"]


def test_a_notebook_sees_table_words_and_figure() -> None:
    found = compare_scores(make_scores([("<a>", "no"), ("b", "no")]), make_scores([("<a>", "<a>"), ("b", "no")]))
    page = found._repr_html_()
    assert "exact match, %" in page and "<img alt='exact match, %: 0.0 before, 50.0 after" in page
    assert "rows: 1 better, 0 worse, sign test p = 1" in page
    assert "&lt;a&gt;" in page and "<a>" not in page
    assert "exact match, %" in repr(found) and "rows: 1 better" in repr(found)


def test_the_figure_shows_both_scores_and_every_row() -> None:
    found = compare_scores(make_scores(answer_right(1, 10)), make_scores(answer_right(6, 10)))
    scores, rows = found.figure().axes
    assert [text.get_text() for text in scores.texts] == ["before", "after"]
    assert [text.xy[1] for text in scores.texts] == [10, 60]
    kinds = [label.get_text() for label in rows.get_yticklabels()]
    counts = dict(zip(kinds, [bar.get_width() for bar in rows.patches], strict=True))
    assert counts == {"became right": 5, "became wrong": 0, "stayed right": 1, "stayed wrong": 4}
    assert rows.get_title(loc="left") == "rows: 5 better, 0 worse"


@pytest.mark.parametrize(("metric", "heights"), [("token_f1", [-50, 0, 100]), ("wer", [200, 0, -100])])
def test_the_figure_shows_each_rows_change_where_it_is_more_than_yes_or_no(metric: str, heights: list[float]) -> None:
    before = make_scores([("a", "a"), ("a", "b"), ("a", "b")], {"evaluate.metric": metric})
    after = make_scores([("a", "b a c"), ("a", "a"), ("a", "b")], {"evaluate.metric": metric})
    bars = compare_scores(before, after).figure().axes[1].patches
    assert [bar.get_height() for bar in bars] == pytest.approx(heights)
    assert bars[0].get_facecolor() != bars[2].get_facecolor()


@pytest.mark.parametrize(
    "other",
    [
        make_scores(answer_right(1, 3)),
        make_scores([("other", "x"), ("a1", "x")]),
        Scores(0.5, 1.0, 8, 1.0, [{**row, "media": "other"} for row in make_scores(answer_right(1, 2)).rows]),
    ],
)
def test_scores_of_other_rows_are_refused(other: Scores) -> None:
    with pytest.raises(DataError, match="different rows"):
        compare_scores(other, make_scores(answer_right(1, 2)))


def test_scores_by_another_metric_are_refused() -> None:
    after = make_scores(answer_right(1, 2), {"evaluate.metric": "wer"})
    with pytest.raises(DataError, match="before was not scored by wer"):
        compare_scores(make_scores(answer_right(1, 2)), after)
