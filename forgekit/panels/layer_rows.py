"""The tree's rows as widgets: a box, a button that opens what is below, a rank, and what it costs."""

import html
from collections.abc import Callable
from typing import Any

import ipywidgets

from .selection import Selection
from .tree import Node
from .view import answer_while_busy

LAYOUTS: dict[str, dict[str, str]] = {  # shared by all rows: each one of its own would be a message to the browser
    "row": {"flex_flow": "row wrap", "align_items": "center", "flex": "0 0 auto"},
    "expand": {"width": "9em"},
    "gap": {"width": "9em", "margin": "2px"},
    "rank": {"width": "4.5em"},
    "text": {"flex": "1 1 16em", "width": "auto"},
    "box": {"flex": "0 0 auto"},  # a tree of limited height scrolls instead of squeezing its rows
}


class Rows:
    """Makes rows and remembers those that are shown. `changed` is called after a row has changed the selection."""

    def __init__(self, selection: Selection, changed: Callable[[], None]) -> None:
        self.selection, self.changed = selection, changed
        self.rows: list[Row] = []
        self.layouts = {name: ipywidgets.Layout(**values) for name, values in LAYOUTS.items()}
        self.styles = {
            "check": ipywidgets.Checkbox().style,
            "rank": ipywidgets.BoundedIntText().style,
            "expand": ipywidgets.Button().style,
            "text": ipywidgets.HTML().style,
        }
        self.boxes: dict[int, Any] = {}
        self.refreshing = False

    def indent(self, level: int) -> Any:
        """Return the layout of a box at one level of the tree."""
        if level not in self.boxes:
            self.boxes[level] = ipywidgets.Layout(width=f"{15.5 - 1.5 * level}em", margin=f"0 0 0 {1.5 * level}em")
        return self.boxes[level]

    def add(self, nodes: tuple[Node, ...], level: int) -> list[Any]:
        """Return the boxes of new rows."""
        fresh = [Row(self, node, level) for node in nodes]
        self.rows += fresh
        self.refresh(fresh)
        return [row.box for row in fresh]

    def refresh(self, rows: "list[Row] | None" = None) -> None:
        """Show the selection in these rows or in all; what a row is told here is no click."""
        self.refreshing = True
        try:
            for row in self.rows if rows is None else rows:
                row.refresh()
        finally:
            self.refreshing = False


class Row:
    """One node of the tree."""

    def __init__(self, rows: Rows, node: Node, level: int) -> None:
        self.rows, self.node, self.level, self.open = rows, node, level, False
        layouts, styles, selection = rows.layouts, rows.styles, rows.selection
        self.check = ipywidgets.Checkbox(
            selection.state(node.names) == "all",
            description=node.label,
            indent=False,
            layout=rows.indent(level),
            style=styles["check"],
        )
        self.rank = ipywidgets.BoundedIntText(
            max(map(selection.rank, node.names)),
            min=1,
            max=1024,
            description=f"rank of {node.label}",
            disabled=all(selection.candidates[name].whole for name in node.names),
            layout=layouts["rank"],
            style=styles["rank"],
            _dom_classes=("fk-rank",),
        )
        self.text = ipywidgets.HTML(describe_row(selection, node), layout=layouts["text"], style=styles["text"])
        self.check.observe(self.read_check, "value")
        self.rank.observe(self.read_rank, "value")
        middle = self.make_expander() if node.children else ipywidgets.Box(layout=layouts["gap"])
        self.line = ipywidgets.Box([self.check, middle, self.rank, self.text], layout=layouts["row"])
        self.box = ipywidgets.VBox([self.line], layout=layouts["box"]) if node.children else self.line

    def make_expander(self) -> Any:
        """Return the button that shows what is below."""
        self.expand = ipywidgets.Button(
            description=self.describe_contents(),
            tooltip=f"Show or hide what {self.node.label} is made of",
            layout=self.rows.layouts["expand"],
            style=self.rows.styles["expand"],
            _dom_classes=("fk-expand",),
        )
        self.expand.on_click(lambda _: self.toggle())
        return self.expand

    def describe_contents(self) -> str:
        """Return what is below this row, with a sign that says whether it is shown."""
        return f"{'▾' if self.open else '▸'} {self.node.contents}"

    def toggle(self) -> None:
        """Show or hide what is below; its rows are made when they are first shown."""
        self.open = not self.open
        if self.open and len(self.box.children) == 1:
            fresh = self.rows.add(self.node.children, self.level + 1)
            below = ipywidgets.VBox(fresh, layout=ipywidgets.Layout(flex="0 0 auto"))
            answer_while_busy(below)
            self.box.children = (self.line, below)
        if len(self.box.children) == 2:
            self.box.children[1].layout.display = None if self.open else "none"
        self.expand.description = self.describe_contents()

    def read_check(self, change: dict[str, Any]) -> None:
        """Switch all modules of this row."""
        if not self.rows.refreshing:
            self.rows.selection.choose(self.node.names, change["new"])
            self.rows.changed()

    def read_rank(self, change: dict[str, Any]) -> None:
        """Give all modules of this row a rank."""
        if not self.rows.refreshing:
            self.rows.selection.set_rank(self.node.names, change["new"])
            self.rows.changed()

    def refresh(self) -> None:
        """Show the state of this row's modules, what they cost, and what is to be known about them."""
        selection, names = self.rows.selection, self.node.names
        state = selection.state(names)
        self.check.value = state == "all"
        classes = ("fk-part",) if state == "part" else ()
        if self.check._dom_classes != classes:
            self.check._dom_classes = classes
        self.rank.value = max(map(selection.rank, names))
        self.text.value = describe_row(selection, self.node)


def describe_row(selection: Selection, node: Node) -> str:
    """Return how many of a row's modules learn, with how many parameters, and the warnings, as HTML."""
    chosen = [name for name in node.names if name in selection.chosen]
    ranks = {selection.rank(name) for name in chosen if selection.candidates[name].per_rank}
    count = sum(map(selection.parameters, chosen))
    many = f"{len(chosen)} of {len(node.names)} · " if node.children else ""
    part = "part: " if 0 < len(chosen) < len(node.names) else ""
    mixed = f" · ranks {min(ranks)} to {max(ranks)}" if len(ranks) > 1 else "" if ranks else " · all its weights"
    line = f"{part}{many}{count:,} parameters{mixed}" if chosen else html.escape(node.help)
    wide = [n for n in chosen if selection.candidates[n].per_rank and is_wide(selection, n)] if node.children else []
    notes = [node.hint] if node.hint else []
    if wide:
        notes.append(
            f"Warning: {len(wide)} modules have fewer rows or columns than their rank; a lower one learns as much."
        )
    return f"<span class='fk-quiet'>{line}</span>" + "".join(
        f"<div class='fk-warning'>{html.escape(note)}</div>" for note in notes
    )


def is_wide(selection: Selection, name: str) -> bool:
    """Say whether a module's rank is larger than one of its sides."""
    return selection.rank(name) > min(selection.candidates[name].shape[:2])
