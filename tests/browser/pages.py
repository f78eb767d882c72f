"""What the browser tests do with a page: write a notebook, run it, look at a panel in both themes and two widths."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat

PANEL = ".forgekit-panel"
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
WIDTHS = (1280, 800)
LOOK_AGAIN = 0.02  # seconds


def write_notebook(path: Path, *cells: str) -> None:
    """Write a notebook of code cells."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)


def run_all(page: Any) -> None:
    """Start all cells of the open notebook and come back while they run."""
    page.wait_for_function(
        "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
    )
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")


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
    cell = page.locator(".jp-CodeCell").filter(has_text=code).first
    return cell.locator(".jp-InputPrompt").first.inner_text().strip() == "[*]:"


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
            page.set_viewport_size({"width": width, "height": 900})
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
