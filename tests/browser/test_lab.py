"""The panels in JupyterLab, from Run All on: a training is watched, saved and stopped, answers are compared, a chat is had.

One notebook, one kernel: the fixture `trained` does what a person does and notes what was seen, the tests look at it.
LayerPanel's tests belong beside these in a file of their own, on a notebook of their own in the same server (fixture `lab`).
"""

import base64
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest

from .conftest import SECONDS, Server
from .pages import (
    PANEL,
    click_and_wait,
    each_look,
    find_violations,
    is_running,
    photographing,
    read_errors,
    run_all,
    write_notebook,
)

pytestmark = pytest.mark.browser

ANSWER_SECONDS = 2.0  # the longest that a click may wait while a cell runs
STEPS = 2000  # more than are reached: Stop ends the training
SHORT = {"data.path": "sample:orders", "data.train": 64, "data.validation": 4, "data.test": 12, "train.max_steps": STEPS, "train.eval_steps": 1000, "train.logging_steps": 1, "train.per_device_train_batch_size": 4, "evaluate.rows": 12, "evaluate.max_new_tokens": 4}  # fmt: skip
COMPLETE = {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}  # fmt: skip
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def choose_cells(project: Path) -> list[str]:
    """Return the code of 01_text up to the adapter, on few rows, then a cell for each panel."""
    cells = [c.source for c in nbformat.read(project / "notebooks" / "01_text.ipynb", as_version=4).cells if c.cell_type == "code"]  # fmt: skip
    first = next(i for i, cell in enumerate(cells) if cell.startswith("recipe"))
    last = next(i for i, cell in enumerate(cells) if "add_adapter" in cell)
    recipe = project / "params" / "text_quick.yaml"
    return [
        f"recipe, settings, run_name = {str(recipe)!r}, {SHORT!r}, 'panels'",
        *cells[first + 1 : last + 1],
        "before = fk.evaluate_model(model, processor, data['test'], config)",
        "trainer = fk.sft_trainer(model, processor, data, config, run)\nfk.RunPanel(trainer, run)",
        "result = trainer.train()",
        "after = fk.evaluate_model(model, processor, data['test'], config)\nfk.ComparePanel(before, after, data['test'])",
        "fk.ChatPanel(model, processor)",
        "import ipykernel, ipywidgets\nprint('the last cell has run', ipykernel.__version__, ipywidgets.__version__)",
    ]


@dataclass(frozen=True)
class Seen:
    """An open notebook whose training was stopped, and what was seen on the way."""

    page: Any
    folder: Path
    steps: list[int]  # as the panel showed them
    save_seconds: float
    stop_seconds: float
    busy: tuple[bool, bool]  # whether the training cell ran just before each click
    running: list[str]  # violations while training ran


def find_panel(page: Any, words: str) -> Any:
    return page.locator(PANEL).filter(has_text=words).first


def read_step(panel: Any) -> int:
    found = re.match(r"step (\d+) of", panel.locator(".forgekit-step").inner_text())
    return int(found.group(1)) if found else 0


@pytest.fixture(scope="module")
def trained(lab: Server, browser: Any, project_folder: Path, pictures: Path) -> Iterator[Seen]:
    write_notebook(lab.folder / "panels.ipynb", *choose_cells(project_folder))
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(SECONDS)
    page.goto(lab.find("/lab/tree/panels.ipynb"))
    run_all(page)
    panel = find_panel(page, "tokens a second")
    with photographing(page, pictures / "failed.png"):
        panel.wait_for(timeout=2 * SECONDS)
    status = panel.locator("[role=status]")
    steps: list[int] = []
    deadline = time.monotonic() + 60
    while len(steps) < 3 and time.monotonic() < deadline:
        step = read_step(panel)
        steps += [step] if step > 0 and step not in steps else []
        time.sleep(0.1)
    panel.scroll_into_view_if_needed()
    save_busy = is_running(page, "trainer.train()")
    save = click_and_wait(
        panel.get_by_role("button", name="Save now"),
        lambda: bool(re.search("Saving|newest checkpoint", status.inner_text())),
    )
    panel.locator("text=newest checkpoint").wait_for()
    page.screenshot(path=pictures / "run-while-training.png")
    running = find_violations(page)
    stop_busy = is_running(page, "trainer.train()")
    stop = click_and_wait(
        panel.get_by_role("button", name="Stop", exact=True), lambda: bool(re.search("Stopp", status.inner_text()))
    )
    panel.locator("text=Stopped after step").wait_for()
    last = page.locator("[data-mime-type='application/vnd.jupyter.stdout']", has_text="the last cell has run")
    last.wait_for()
    print(last.inner_text())
    yield Seen(page, lab.folder / "forgekit_runs" / "panels", steps, save, stop, (save_busy, stop_busy), running)
    page.close()


def test_the_counter_moves_while_the_training_cell_runs(trained: Seen) -> None:
    assert len(trained.steps) == 3 and trained.steps == sorted(trained.steps)


def test_clicks_are_answered_while_the_kernel_is_busy(trained: Seen) -> None:
    assert trained.busy == (True, True)
    print(f"Save now was answered after {trained.save_seconds:.2f} s, Stop after {trained.stop_seconds:.2f} s")
    assert max(trained.save_seconds, trained.stop_seconds) < ANSWER_SECONDS


def test_stop_leaves_a_complete_checkpoint_and_the_notebook_goes_on(trained: Seen) -> None:
    status = find_panel(trained.page, "tokens a second").locator("[role=status]").inner_text()
    found = re.search(r"Stopped after step (\d+); newest checkpoint: (\d+)", status)
    assert found and found[1] == found[2] and int(found[1]) < STEPS
    kept = {
        path.name: {file.name for file in path.iterdir()}
        for path in (trained.folder / "checkpoints").glob("checkpoint-*")
    }
    assert len(kept) == 2 and kept[f"checkpoint-{found[1]}"] >= COMPLETE  # the other is Save now's
    assert all(files >= COMPLETE for files in kept.values())
    assert not read_errors(trained.page)


def test_compare_filters_and_turns_pages(trained: Seen) -> None:
    panel = find_panel(trained.page, "Answers that are")
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


def test_chat_answers_on_both_sides_with_a_picture(trained: Seen) -> None:
    panel = find_panel(trained.page, "max_new_tokens")
    panel.get_by_label("max_new_tokens").fill("4")
    panel.get_by_label("Message").fill("Turn this order into JSON: tea & <b>soap</b>")
    with trained.page.expect_file_chooser() as chooser:
        panel.get_by_role("button", name="Attach").click()
    chooser.value.set_files({"name": "dot.png", "mimeType": "image/png", "buffer": base64.b64decode(PIXEL)})
    panel.get_by_role("button", name="Attach (1)").wait_for()
    panel.get_by_role("button", name="Send").click()
    panel.locator("text=Answered").wait_for()
    text = panel.inner_text()
    assert "tea & <b>soap</b>" in text and "Tuned model:" in text and "Base model:" in text
    assert panel.locator("img[alt*='1 x 1 pixels']").count() == 1
    assert panel.get_by_label("Message").input_value() == ""


def test_axe_finds_nothing_serious_and_every_look_has_its_picture(trained: Seen, pictures: Path) -> None:
    assert trained.running == []
    page = trained.page
    for look in each_look(page):
        assert find_violations(page) == [], look
        for number, panel in enumerate(page.locator(PANEL).all()):
            panel.scroll_into_view_if_needed()
            panel.screenshot(path=pictures / f"{('run', 'compare', 'chat')[number]}-{look}.png")
            box = panel.bounding_box()
            assert box and box["x"] + box["width"] <= page.viewport_size["width"], look


def test_the_notebooks_interrupt_does_what_stop_does(trained: Seen) -> None:
    page, panel = trained.page, find_panel(trained.page, "tokens a second")
    page.locator(".jp-CodeCell", has_text="trainer.train()").locator(".cm-content").first.click()
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-cell'); }")
    panel.locator("text=/: Running/").wait_for()
    deadline = time.monotonic() + 30
    while read_step(panel) not in (2, 3, 4) and time.monotonic() < deadline:
        time.sleep(0.05)
    page.evaluate("() => { window.jupyterapp.commands.execute('kernelmenu:interrupt'); }")
    panel.locator("text=Stopped after step").wait_for()
    step = read_step(panel)
    assert 0 < step < 100
    assert {path.name for path in (trained.folder / "checkpoints" / f"checkpoint-{step}").iterdir()} >= COMPLETE
    assert not read_errors(page)
