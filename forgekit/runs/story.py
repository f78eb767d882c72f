"""What an executed notebook says of its own end: a banner, a link to the cell, and a status for each cell."""

import html
from pathlib import Path
from typing import Any

from ..files import write_text
from ..run_folder import DONE
from .outcome import Outcome

MARK = "papermill-error-cell-tag"  # papermill takes cells with this tag out when it executes the notebook again
ANCHOR = "papermill-error-cell"
STYLE = 'style="color:red; font-family:Helvetica Neue, Helvetica, Arial, sans-serif; font-size:1.5em;"'


def tell_end(notebook: Any, outcome: Outcome) -> None:
    """Write the outcome into a notebook: banner, anchor, metadata, and no cell that says more than happened to it.

    The cells' positions move by the two that are put in, so this is the last thing done to a notebook.
    """
    ended = outcome.state == DONE
    notebook.metadata["forgekit"] = {"state": outcome.state, "error": outcome.error, **outcome.for_record()}
    for cell in notebook.cells:
        status = cell.metadata.get("papermill", {})
        if status.get("status") == "running":
            status |= {"status": "failed", "exception": True}
    notebook.metadata.setdefault("papermill", {})["exception"] = None if ended else True
    notebook.cells = [cell for cell in notebook.cells if MARK not in cell.metadata.get("tags", [])]
    if not ended:
        add_banner(notebook, outcome)


def add_banner(notebook: Any, outcome: Outcome) -> None:
    """Put a red line at the top, and where a cell was cut short a second one before it, which the first one links to."""
    words = html.escape(f"This run {outcome.sentence()}")
    if outcome.cell is None:
        insert_mark(notebook, 0, f"<span {STYLE}>{words}</span>")
        return
    where = "In [{}]".format(" " if outcome.prompt is None else outcome.prompt)
    insert_mark(notebook, outcome.cell, f'<span id="{ANCHOR}" {STYLE}>The run ended in this cell:</span>')
    insert_mark(notebook, 0, f'<span {STYLE}>{words} See <a href="#{ANCHOR}">{where}</a>.</span>')


def insert_mark(notebook: Any, position: int, source: str) -> None:
    """Insert a line of ours that papermill knows how to take out again."""
    from nbformat.v4 import new_markdown_cell

    notebook.cells.insert(position, new_markdown_cell(source, metadata={"tags": [MARK]}))


def write_notebook(notebook: Any, path: Path) -> None:
    """Write a notebook whole or not at all; a full disk leaves the one that was there."""
    import nbformat

    write_text(path, nbformat.writes(notebook) + "\n")
