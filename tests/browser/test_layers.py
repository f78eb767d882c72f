"""02_vision in JupyterLab: Run All without a pause, layers are chosen while a cell runs; then E4B's panel and its times."""

import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .conftest import SECONDS, Server
from .layers import (
    Change,
    count_cells,
    find_layers,
    press_preset,
    read_totals,
    switch_tower,
    time_click,
    type_layers,
)
from .pages import (
    close_notebook,
    command,
    each_look,
    find_cell,
    find_violations,
    is_running,
    open_notebook,
    photographing,
    read_errors,
    run_new_cell,
    shorten_notebook,
    wait_for_end,
)
from .training import (
    ANSWER_SECONDS,
    CELL,
    COMPLETE,
    SHORT,
    STEPS,
    Watched,
    count_parameters,
    list_checkpoints,
    read_stop,
    watch_training,
)

pytestmark = pytest.mark.browser

RECOMPUTE_SECONDS = 0.1  # the longest that new totals may take in the kernel, as a median
ROUND_TRIP_SECONDS = 2.0  # the same from a click in the page, by server, kernel and back, beside other work
BUILD_SECONDS = 2.0
CLICKS = 10
# What a panel takes in the kernel: processor time, which other work on the machine does not change
LARGE = """import statistics, time
e4b = config.change({"model.id": "google/gemma-3n-E4B-it"})
start = time.process_time()
large = fk.LayerPanel(e4b)
box, built = large.widget, time.process_time() - start
def take_time(cell):
    start = time.process_time()
    cell.click()
    return time.process_time() - start
times = [take_time(cell) for cell in large._widget.strip.cells.values()]
large._widget.controls.restore()
print(f"built in {built:.3f} s, totals in {statistics.median(times):.4f} s")
large"""


@dataclass(frozen=True)
class Opened:
    """The notebook at its end, and what was seen on the way."""

    page: Any
    run: Path
    given: Any  # totals of the recipe
    changes: dict[str, Change]  # while the training cell ran
    busy: bool
    watched: Watched


@pytest.fixture(scope="module")
def vision(lab: Server, browser: Any, pictures: Path) -> Iterator[Opened]:
    shorten_notebook(lab.folder / "notebooks" / "02_vision.ipynb", SHORT, "vision")
    page = open_notebook(browser, lab, "notebooks/02_vision.ipynb")
    with photographing(page, pictures / "failed.png"):
        command(page, "notebook:run-all-cells")
        layers = find_layers(page)
        layers.wait_for(timeout=5 * SECONDS)
        given = read_totals(layers)
        page.locator(".forgekit-step", has_text=re.compile(r"step [1-9]")).wait_for(timeout=5 * SECONDS)
        changes = {
            "tower": switch_tower(layers, "vision"),
            "range": type_layers(layers, "last 3"),
            "preset": press_preset(layers, "Vision + projector"),
        }
        busy = is_running(page, CELL)
        watched = watch_training(page)
        wait_for_end(find_cell(page, "run.finish()\n"), 5 * SECONDS)
    yield Opened(page, lab.folder / "forgekit_runs" / "vision", given, changes, busy, watched)
    close_notebook(page)


def test_layers_are_chosen_while_the_training_cell_runs(vision: Opened) -> None:
    assert vision.busy
    for name, change in vision.changes.items():
        print(f"{name}: {change.before} -> {change.after} in {change.seconds:.2f} s")
        assert change.after.differs(change.before)
        assert change.seconds < ANSWER_SECONDS
    assert vision.changes["tower"].after.modules > vision.given.modules


def test_run_all_waits_for_no_panel_and_trains_what_the_recipe_says(vision: Opened) -> None:
    stopped, newest = read_stop(vision.page)
    assert stopped == newest < STEPS
    assert count_parameters(vision.run, stopped) == vision.given.parameters


def test_the_counter_moves_and_stop_leaves_a_complete_checkpoint(vision: Opened) -> None:
    assert vision.watched.steps == sorted(vision.watched.steps) and len(vision.watched.steps) == 3
    assert vision.watched.busy == [True, True]
    assert max(vision.watched.seconds.values()) < ANSWER_SECONDS
    assert vision.watched.violations == []
    kept = list_checkpoints(vision.run)
    assert len(kept) == 2 and all(files >= COMPLETE for files in kept.values())


def test_the_notebook_comes_to_its_end_without_errors(vision: Opened) -> None:
    assert not read_errors(vision.page)


def test_the_recipe_s_button_shows_what_a_cell_shows(vision: Opened) -> None:
    panel = find_layers(vision.page)
    panel.get_by_role("button", name="Show the recipe").click()
    text = panel.locator("pre").inner_text()
    assert wait_for_end(run_new_cell(vision.page, "print(panel.to_yaml())")).strip() == text.strip()
    assert re.search(r"^  layers: \[.*vision", text, re.M)


def test_a_layer_is_switched_by_keyboard(vision: Opened) -> None:
    panel = find_layers(vision.page)
    press_preset(panel, "Text only")
    before, layers = read_totals(panel), count_cells(panel)
    panel.locator(".fk-cell").first.focus()
    vision.page.keyboard.press("Tab")
    vision.page.keyboard.press("Space")
    panel.locator(".fk-cell.fk-on").nth(len(layers) - 1).wait_for(state="detached")
    assert count_cells(panel) == [layer for layer in layers if layer != 1]
    assert read_totals(panel).modules < before.modules


def test_e4b_s_panel_is_quick_and_axe_finds_nothing_in_any_look(vision: Opened, pictures: Path) -> None:
    page = vision.page
    printed = wait_for_end(run_new_cell(page, LARGE))
    built, recompute = (float(number) for number in re.findall(r"in ([\d.]+) s", printed))
    panel = page.locator(".fk-panel").last
    panel.locator(".fk-cell").nth(34).wait_for()
    cells = [time_click(cell) for cell in panel.locator(".fk-cell").all()[:CLICKS]]
    names = ("Everything", "Attention only") * (CLICKS // 2)
    presets = [time_click(panel.get_by_role("button", name=name, exact=True)) for name in names]
    print(printed.strip())
    for name, times in (("a layer", cells), ("a preset", presets)):
        print(f"E4B, from a click on {name} to new totals in the page: median {statistics.median(times):.0f} ms, most {max(times):.0f} ms")  # fmt: skip
    assert built < BUILD_SECONDS and recompute < RECOMPUTE_SECONDS
    assert statistics.median(cells + presets) / 1000 < ROUND_TRIP_SECONDS
    panel.get_by_role("button", name=re.compile("groups")).first.click()
    panel.get_by_role("checkbox", name="attention", exact=True).wait_for()
    panel.get_by_role("button", name="Last n layers").click()
    for look in each_look(page):
        assert find_violations(page) == [], look
        panel.evaluate("(panel) => panel.scrollIntoView()")
        panel.screenshot(path=pictures / f"layers-e4b-{look}.png")
        box = panel.bounding_box()
        assert box and box["x"] + box["width"] <= page.viewport_size["width"], look
