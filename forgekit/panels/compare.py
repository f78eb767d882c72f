"""ComparePanel: what the model answered before and after training, side by side, with the media of the question."""

import functools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..data.show import show_turn
from ..errors import DataError
from ..evaluate.scores import Scores, show_answers
from .view import NARROW, PANEL, make_bundle, say

if TYPE_CHECKING:
    from datasets import Dataset

PAGE = 5  # rows shown at once
RULED = "<table rules='rows' cellpadding='6' style='border-collapse:collapse'>"  # a widget gets no table style from JupyterLab

# What a row is picked by: before and after are rows of Scores
FILTERS = {
    "all": lambda before, after: True,
    "wrong": lambda before, after: not after["right"],
    "changed": lambda before, after: before["prediction"] != after["prediction"],
    "right": lambda before, after: after["right"],
}


class ComparePanel:
    """Answers before and after training, a page at a time; all of them, or those now wrong, changed, or now right.

    Without a front end it shows what `show_answers` shows: the first rows as a table.
    """

    def __init__(self, before: Scores, after: Scores, dataset: "Dataset | None" = None):
        """Take two scores of the same rows, from `evaluate_model`; with the rows, questions are shown with their media.

        Raises DataError when the scores are of different rows.
        """
        if [row["question"] for row in before.rows] != [row["question"] for row in after.rows]:
            raise DataError("before and after are scores of different rows; score the same ones, in the same order.")
        self.before, self.after, self.dataset = before, after, dataset
        pairs = list(zip(before.rows, after.rows, strict=True))
        self.found = {name: [i for i, pair in enumerate(pairs) if keep(*pair)] for name, keep in FILTERS.items()}
        self.chosen, self.page = "all", 0

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(rows)} {name}" for name, rows in self.found.items() if name != "all")
        return f"ComparePanel: {len(self.after.rows)} rows, {counts}"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        table = show_answers(self.before, self.after, PAGE, self.dataset)
        return make_bundle(lambda: self.box, f"{self!r}\n{table}", table._repr_html_())

    @functools.cached_property
    def box(self) -> Any:
        """The panel's outermost widget."""
        import ipywidgets as widgets

        options = [(f"{name} ({len(rows)})", name) for name, rows in self.found.items()]
        choice = widgets.Dropdown(options=options, value=self.chosen, description="Answers that are", style=NARROW)
        back = widgets.Button(description="Previous", tooltip="Show the rows before these")
        forth = widgets.Button(description="Next", tooltip="Show the rows after these")
        place, table = widgets.HTML(), widgets.HTML()
        self.widgets = SimpleNamespace(choice=choice, back=back, forth=forth, place=place, table=table)
        choice.observe(lambda change: self.choose(change["new"]), "value")
        back.on_click(lambda button: self.turn(-1))
        forth.on_click(lambda button: self.turn(1))
        controls = widgets.HBox([choice, back, forth, place], layout={"flex_flow": "row wrap", "align_items": "center"})
        box = widgets.VBox([controls, table])
        box.add_class(PANEL)
        self.show()
        return box

    def choose(self, name: str) -> None:
        """Show the first page of a filter: all, wrong, changed or right."""
        self.chosen, self.page = name, 0
        self.show()

    def turn(self, pages: int) -> None:
        """Go forth or back, no further than there are rows."""
        last = max(0, (len(self.found[self.chosen]) - 1) // PAGE)
        self.page = min(max(self.page + pages, 0), last)
        self.show()

    def rows(self) -> list[int]:
        """Return the numbers of the rows on this page."""
        return self.found[self.chosen][self.page * PAGE : (self.page + 1) * PAGE]

    def show(self) -> None:
        """Bring the widgets to the chosen page."""
        number, first = len(self.found[self.chosen]), self.page * PAGE
        w, rows = self.widgets, self.rows()
        w.table.value = self.write_table(rows)
        w.place.value = say(f"{first + 1} to {first + len(rows)} of {number}" if rows else "no such answer")
        w.back.disabled, w.forth.disabled = first == 0, first + PAGE >= number

    def write_table(self, rows: list[int]) -> str:
        """Return rows as an HTML table."""
        from ..table import Table

        if not rows:
            return ""
        table = Table([self.describe_row(i) for i in rows])._repr_html_()
        return f"<div style='line-height:1.4'>{table.replace('<table>', RULED, 1)}</div>"

    def describe_row(self, i: int) -> dict[str, Any]:
        """Return one row of the table; verdicts are words, so that nothing depends on colour."""
        before, after = self.before.rows[i], self.after.rows[i]
        question = show_turn(self.dataset[i]["messages"][-2]) if self.dataset is not None else after["question"]
        return {
            "row": i + 1,
            "question": question,
            "right answer": after["reference"],
            "before": f"{before['prediction']}\n({write_verdict(before)})",
            "after": f"{after['prediction']}\n({write_verdict(after)})",
        }


def write_verdict(row: dict[str, Any]) -> str:
    """Return right or wrong."""
    return "right" if row["right"] else "wrong"
