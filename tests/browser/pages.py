"""What the browser tests do with a page: open a notebook, run it, look at a panel in both themes and two widths."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat

from .conftest import SECONDS, Server

PANEL = ".forgekit-panel"
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
WIDTHS = (1280, 800)
TALL = 1800  # pixels, so that a picture holds a whole panel
LOOK_AGAIN = 0.02  # seconds
IDLE = """(path) => {
    const context = window.jupyterapp?.shell.currentWidget?.sessionContext;
    return context?.path === path && context.session?.kernel?.status === 'idle';
}"""
SELECT = """(words) => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    notebook.activeCellIndex = notebook.widgets.findIndex((cell) => cell.model.sharedModel.source.includes(words));
}"""
ADD = """(source) => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    notebook.model.sharedModel.addCell({ cell_type: 'code', source });
    notebook.activeCellIndex = notebook.widgets.length - 1;
}"""


def write_notebook(path: Path, *cells: str) -> None:
    """Write a notebook of code cells."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)


def shorten_notebook(path: Path, settings: dict[str, Any], run_name: str) -> None:
    """Give a copied notebook settings and a run's name as papermill does, and take its stored outputs away."""
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    notebook = parameterize_notebook(load_notebook_node(str(path)), {"settings": settings, "run_name": run_name})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, path)


def open_notebook(browser: Any, lab: Server, path: str) -> Any:
    """Return a page with a notebook of the Lab's folder open and its kernel ready."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(SECONDS)
    page.goto(lab.find(f"/lab/tree/{path}") + "&reset")  # without what an earlier page had open
    page.wait_for_function(IDLE, arg=path)
    return page


def close_notebook(page: Any) -> None:
    """End the open notebook's kernel, so that the next one has its memory, and close the page."""
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.close()


def command(page: Any, name: str, code: str = "") -> None:
    """Give JupyterLab a command, with the cell that holds some code selected, and come back while it works."""
    if code:
        page.evaluate(SELECT, code)
    page.evaluate("(name) => { window.jupyterapp.commands.execute(name); }", name)


def run_new_cell(page: Any, code: str) -> Any:
    """Write a cell at the end of the open notebook, run it, and return it while it runs."""
    page.evaluate(ADD, code)
    command(page, "notebook:run-cell")
    return page.locator(".jp-CodeCell").last


def wait_for_end(cell: Any, milliseconds: int = SECONDS) -> str:
    """Wait until a cell has run; return what it has printed."""
    cell.locator(".jp-InputPrompt", has_text=re.compile(r"\[\d+\]")).first.wait_for(timeout=milliseconds)
    return "".join(cell.locator("[data-mime-type='application/vnd.jupyter.stdout']").all_inner_texts())


def find_cell(page: Any, code: str) -> Any:
    """Return the first cell that holds some code."""
    return page.locator(".jp-CodeCell").filter(has_text=code).first


def find_panel(page: Any, words: str) -> Any:
    """Return the newest panel in which some words stand."""
    return page.locator(PANEL).filter(has_text=words).last


@contextlib.contextmanager
def photographing(page: Any, path: Path) -> Iterator[None]:
    """Take a picture of the page when the block fails, before the error goes on."""
    try:
        yield
    except BaseException:
        page.screenshot(path=path)
        raise


def is_running(page: Any, code: str) -> bool:
    """Say whether the cell that holds this code runs. (The kernel's own status also tells of the thread that takes clicks.)"""
    return find_cell(page, code).locator(".jp-InputPrompt").first.inner_text().strip() == "[*]:"


def read_errors(page: Any) -> list[str]:
    """Return what cells have raised."""
    return page.locator("[data-mime-type='application/vnd.jupyter.error'], .jp-OutputArea-output[data-mime-type*='stderr']").all_inner_texts()  # fmt: skip


def click_and_wait(button: Any, answered: Callable[[], bool], seconds: float = 20) -> float:
    """Click, and return the seconds until the page shows the answer."""
    button.click()
    start = time.monotonic()
    while not answered():
        assert time.monotonic() - start < seconds, f"no answer to the click in {seconds} s"
        time.sleep(LOOK_AGAIN)
    return time.monotonic() - start


def each_look(page: Any) -> Iterator[str]:
    """Yield the names of the four looks, light and dark, wide and narrow, with the page set to each."""
    for theme, name in THEMES.items():
        page.evaluate("(theme) => window.jupyterapp.commands.execute('apputils:change-theme', { theme })", name)
        page.wait_for_selector(f"body[data-jp-theme-light='{str(theme == 'light').lower()}']", state="attached")
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": TALL})
            page.wait_for_timeout(300)  # the panels flow anew
            yield f"{theme}-{width}"


def find_violations(page: Any, within: str = PANEL) -> list[str]:
    """Return axe-core's serious and critical violations inside the panels."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, context={"include": [[within]]}).response["violations"]
    return [
        f"{rule['id']} ({rule['impact']}): {node['html'][:200]}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]
