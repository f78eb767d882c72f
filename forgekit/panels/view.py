"""What the panels share: whether somebody is there to see a widget, and how one is shown with a text in its place."""

import html
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

WIDGET = "application/vnd.jupyter.widget-view+json"
NARROW = {"description_width": "initial"}  # a label as wide as its words
PANEL = "forgekit-panel"  # class of every panel's outermost box


def has_front_end() -> bool:
    """Say whether a person sits at the notebook, so that widgets can be seen.

    JupyterLab, Notebook and VS Code tell the kernel with each cell that they can ask their user for input; nbclient
    (papermill, nbconvert, `forgekit run`) and nbval tell it that they cannot. Voila runs on nbclient and shows widgets; it
    puts its name into the kernel's environment. Without a front end no widget is made at all, so that an executed notebook
    holds no widget state.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    kernel = getattr(shell, "kernel", None)
    if kernel is None:
        return False
    if "google.colab" in sys.modules or os.environ.get("SERVER_SOFTWARE", "").startswith("voila"):
        return True
    return bool(kernel.get_parent("shell").get("content", {}).get("allow_stdin"))


def make_bundle(build: Callable[[], Any], text: str, page: str | None = None) -> dict[str, Any]:
    """Return what a cell shows: text, HTML if there is some, and where a person sits the widget that `build` returns.

    The keys are MIME types. A front end shows the widget where it can and the HTML or text where it cannot.
    """
    bundle: dict[str, Any] = {"text/plain": text}
    if page is not None:
        bundle["text/html"] = page
    if has_front_end():
        box = build()
        answer_while_busy(box)
        bundle[WIDGET] = {"version_major": 2, "version_minor": 0, "model_id": box.model_id}
    return bundle


def answer_while_busy(box: Any) -> None:
    """Let clicks be answered while a cell runs, on ipykernel 7.4 too.

    JupyterLab sends a widget's messages to a thread beside the cell's. 7.4.0 asks it to use the thread that last sent
    something, which is the busy one: a click in a cell of ten seconds was answered after twelve, on 7.1 to 7.3 after 40 ms.
    The method is private and exists from 7.4 on, hence the look before.
    """
    for widget in find_widgets(box):
        if hasattr(widget.comm, "_reply_subshell_for"):
            widget.comm._reply_subshell_for = lambda data, default: default


def find_widgets(box: Any) -> Iterator[Any]:
    """Yield a widget and all that are inside it."""
    yield box
    for child in getattr(box, "children", ()):
        yield from find_widgets(child)


def say(text: str) -> str:
    """Return a line of HTML that a screen reader reads out when it changes."""
    return f"<p role='status' style='margin:0'>{html.escape(text)}</p>"
