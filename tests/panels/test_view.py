"""Widgets are made where a person sits, and only there; a click is answered while a cell runs on every ipykernel."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from forgekit.panels import view
from forgekit.panels.view import WIDGET, answer_while_busy, has_front_end, make_bundle

widgets = importlib.import_module("ipywidgets")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function: the content of a cell's request -> a kernel that runs it."""
    monkeypatch.delenv("SERVER_SOFTWARE", raising=False)

    def pretend(**content: Any) -> None:
        shell = SimpleNamespace(kernel=SimpleNamespace(get_parent=lambda channel: {"content": content}))
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))

    return pretend


def test_a_front_end_is_one_that_can_ask_its_user(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_front_end()  # no kernel
    kernel(allow_stdin=False)
    assert not has_front_end()
    monkeypatch.setenv("SERVER_SOFTWARE", "voila/0.5.13")
    assert has_front_end()
    monkeypatch.delenv("SERVER_SOFTWARE")
    kernel(allow_stdin=True)
    assert has_front_end()
    kernel()
    assert not has_front_end()


def test_no_widget_is_made_without_a_front_end(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def build() -> Any:
        made.append(widgets.VBox())
        return made[-1]

    assert make_bundle(build, "words", "<p>words</p>") == {"text/plain": "words", "text/html": "<p>words</p>"}
    assert not made
    monkeypatch.setattr(view, "has_front_end", lambda: True)
    assert make_bundle(build, "words")[WIDGET]["model_id"] == made[0].model_id


def test_every_widget_of_a_panel_is_kept_off_the_busy_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    button = widgets.Button()
    box = widgets.VBox([widgets.HBox([button])])
    answer_while_busy(box)  # ipykernel up to 7.3: nothing to set
    assert not hasattr(button.comm, "_reply_subshell_for")
    for widget in (box, box.children[0], button):
        monkeypatch.setattr(widget.comm, "_reply_subshell_for", lambda data, default: "busy", raising=False)
    answer_while_busy(box)
    assert {w.comm._reply_subshell_for({}, "free") for w in (box, box.children[0], button)} == {"free"}


def test_an_executed_notebook_holds_text_and_html_and_no_widget(
    tmp_path: Path, project_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(project_folder))  # for the kernel
    cell = (
        "from forgekit import ComparePanel, Scores\n"
        "rows = [{'question': 'q', 'reference': 'a', 'prediction': 'a', 'right': True}]\n"
        "ComparePanel(Scores(1.0, 0.5, 3, 1.0, rows), Scores(1.0, 0.5, 3, 1.0, rows))"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    executed = NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert "widgets" not in executed.metadata and "widget-view" not in str(executed)
    (output,) = executed.cells[0].outputs
    assert output.data.keys() == {"text/plain", "text/html"}
    assert output.data["text/plain"].startswith("ComparePanel: 1 rows, 0 wrong, 0 changed, 1 right")
