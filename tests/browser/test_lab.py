"""01_text in JupyterLab, as a person uses it: layers are chosen, the rest is run, a training is watched, saved and stopped,
answers are compared, a chat is had.

One notebook, one kernel: the fixture `text` does what a person does and notes what was seen, the tests look at it.
"""

import base64
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .conftest import SECONDS, Server
from .layers import Change, count_cells, find_layers, press_preset, switch_tower, type_layers
from .pages import (
    PANEL,
    click_and_wait,
    close_notebook,
    command,
    each_look,
    find_cell,
    find_panel,
    find_violations,
    open_notebook,
    photographing,
    read_errors,
    run_new_cell,
    shorten_notebook,
    wait_for_end,
)
from .training import (
    ANSWER_SECONDS,
    COMPLETE,
    SHORT,
    STEPS,
    Watched,
    count_parameters,
    list_checkpoints,
    read_step,
    read_stop,
    watch_training,
)

pytestmark = pytest.mark.browser

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PLAN = """plan = fk.plan_layers(fk.load_config("params/from_the_panel.yaml"))
print(len(plan.modules), plan.parameters)"""
AGAIN = """again = fk.start_run(config, "again")
model, processor = fk.load_model(config)
trainer = fk.sft_trainer(fk.add_adapter(model, config), processor, data, config, again)
fk.RunPanel(trainer, again)"""


@dataclass(frozen=True)
class Opened:
    """The notebook at its end, and what was seen on the way."""

    page: Any
    lab: Path
    changes: dict[str, Change]  # in the layer panel, before anything was trained
    watched: Watched

    @property
    def run(self) -> Path:
        return self.lab / "forgekit_runs" / "text"


@pytest.fixture(scope="module")
def text(lab: Server, browser: Any, pictures: Path) -> Iterator[Opened]:
    shorten_notebook(lab.folder / "notebooks" / "01_text.ipynb", SHORT, "text")
    page = open_notebook(browser, lab, "notebooks/01_text.ipynb")
    with photographing(page, pictures / "failed.png"):
        command(page, "notebook:run-all-above", "config = panel.config")
        layers = find_layers(page)
        layers.wait_for(timeout=5 * SECONDS)
        wait_for_end(find_cell(page, "panel = fk.LayerPanel"))
        changes = {
            "tower": switch_tower(layers, "vision"),
            "preset": press_preset(layers, "Attention only"),
            "range": type_layers(layers, "0-1, last 2"),
        }
        command(page, "notebook:run-all-below", "config = panel.config")
        watched = watch_training(page, pictures / "run-while-training.png")
        wait_for_end(find_cell(page, "run.finish()"))
    yield Opened(page, lab.folder, changes, watched)
    close_notebook(page)


def test_a_tower_a_preset_and_a_typed_range_change_the_totals(text: Opened) -> None:
    for name, change in text.changes.items():
        print(f"{name}: {change.before} -> {change.after} in {change.seconds:.2f} s")
        assert change.after.differs(change.before) and change.words != "Last change: none"
    tower, preset, typed = text.changes.values()
    assert tower.after.modules > tower.before.modules and tower.after.memory >= tower.before.memory
    assert preset.after.modules < tower.before.modules
    assert typed.after.modules < preset.after.modules and len(count_cells(find_layers(text.page))) == 4


def test_the_cell_s_recipe_is_the_choice_and_what_was_trained(text: Opened) -> None:
    shown = wait_for_end(run_new_cell(text.page, "print(panel.to_yaml())"))
    assert re.search(r"^  layers: \[attention\]$", shown, re.M) and "layers_to_transform: 0-1," in shown
    recipe = text.lab / "params" / "from_the_panel.yaml"
    recipe.write_text(shown, encoding="utf-8")
    totals = text.changes["range"].after
    assert wait_for_end(run_new_cell(text.page, PLAN)).split() == [str(totals.modules), str(totals.parameters)]
    assert count_parameters(text.run, read_stop(text.page)[0]) == totals.parameters


def test_the_counter_moves_while_the_training_cell_runs(text: Opened) -> None:
    assert len(text.watched.steps) == 3 and text.watched.steps == sorted(text.watched.steps)


def test_clicks_are_answered_while_the_kernel_is_busy(text: Opened) -> None:
    assert text.watched.busy == [True, True]
    print(", ".join(f"{name} was answered after {seconds:.2f} s" for name, seconds in text.watched.seconds.items()))
    assert max(text.watched.seconds.values()) < ANSWER_SECONDS


def test_stop_leaves_a_complete_checkpoint_and_the_notebook_goes_on(text: Opened) -> None:
    stopped, newest = read_stop(text.page)
    assert stopped == newest < STEPS
    kept = list_checkpoints(text.run)
    assert len(kept) == 2 and stopped in kept  # the other is Save now's
    assert all(files >= COMPLETE for files in kept.values())
    assert not read_errors(text.page)


def test_compare_filters_and_turns_pages(text: Opened) -> None:
    panel = find_panel(text.page, "Answers that are")
    rows = panel.locator("tbody tr")
    first = rows.first.inner_text()
    assert rows.count() == 5 and first.startswith("1\t")
    click_and_wait(panel.get_by_role("button", name="Next"), lambda: rows.first.inner_text().startswith("6\t"))
    panel.locator("text=6 to 10 of 12").wait_for()
    choice = panel.get_by_label("Answers that are")
    options = dict(
        re.match(r"(\w+)\s\((\d+)\)", text).groups() for text in choice.locator("option").all_text_contents()
    )  # type: ignore[union-attr]
    assert options["all"] == "12" and int(options["wrong"]) + int(options["right"]) == 12
    choice.select_option(index=list(options).index("wrong"))
    panel.locator(f"text=1 to 5 of {options['wrong']}").wait_for()
    assert all("(wrong)" in text.split("\t")[-1] for text in rows.all_inner_texts())


def test_chat_answers_on_both_sides_with_a_picture(text: Opened) -> None:
    panel = find_panel(text.page, "max_new_tokens")
    panel.get_by_label("max_new_tokens").fill("4")
    panel.get_by_label("Message").fill("Turn this order into JSON: tea & <b>soap</b>")
    with text.page.expect_file_chooser() as chooser:
        panel.get_by_role("button", name="Attach").click()
    chooser.value.set_files({"name": "dot.png", "mimeType": "image/png", "buffer": base64.b64decode(PIXEL)})
    panel.get_by_role("button", name="Attach (1)").wait_for()
    panel.get_by_role("button", name="Send").click()
    panel.locator("text=Answered").wait_for()
    text = panel.inner_text()
    assert "tea & <b>soap</b>" in text and "Tuned model:" in text and "Base model:" in text
    assert panel.locator("img[alt*='1 x 1 pixels']").count() == 1
    assert panel.get_by_label("Message").input_value() == ""


def test_axe_finds_nothing_serious_and_every_look_has_its_picture(text: Opened, pictures: Path) -> None:
    assert text.watched.violations == []
    page = text.page
    for look in each_look(page):
        assert find_violations(page) == [], look
        for name, panel in zip(("layers", "run", "compare", "chat"), page.locator(PANEL).all(), strict=True):
            panel.evaluate("(panel) => panel.scrollIntoView()")
            panel.screenshot(path=pictures / f"{name}-{look}.png")
            box = panel.bounding_box()
            assert box and box["x"] + box["width"] <= page.viewport_size["width"], look


def test_the_notebooks_interrupt_does_what_stop_does(text: Opened) -> None:
    page = text.page
    wait_for_end(run_new_cell(page, AGAIN))
    panel = find_panel(page, "tokens a second")
    cell = run_new_cell(page, "ended = trainer.train()")
    panel.locator("text=/: Running/").wait_for()
    deadline = time.monotonic() + 30
    while read_step(panel) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    command(page, "kernelmenu:interrupt")
    panel.locator("text=Stopped after step").wait_for()
    wait_for_end(cell)
    step = read_step(panel)
    assert 0 < step < 100
    assert list_checkpoints(text.lab / "forgekit_runs" / "again")[step] >= COMPLETE
    assert not read_errors(page)
