"""The same panels in voila, where nobody sees the code: the page renders and clicks are answered."""

from typing import Any

import pytest

from .conftest import SECONDS, Server
from .layers import count_cells, find_layers, press_preset
from .pages import PANEL, click_and_wait, find_violations, photographing, write_notebook

pytestmark = pytest.mark.browser

SETTINGS = {"model.id": "tiny", "model.engine": "huggingface", "model.device": "cpu", "model.load_in": "16bit", "model.max_length": 256}  # fmt: skip
CELLS = [
    "import forgekit as fk\n"
    "rows = [{'question': f'question {i}', 'reference': 'a', 'prediction': 'ab'[i % 2], 'right': i % 2 == 0} for i in range(7)]\n"
    "scores = fk.Scores(4 / 7, 0.5, 7, 1.0, rows)\n"
    "fk.ComparePanel(scores, scores)",
    f"config = fk.load_config(None, {SETTINGS!r})\n"
    "model, processor = fk.load_model(config)\n"
    "fk.LayerPanel(config, model)",
    "fk.ChatPanel(fk.add_adapter(model, config), processor)",
]


def test_panels_render_and_answer(voila: Server, browser: Any, pictures: Any) -> None:
    write_notebook(voila.folder / "app.ipynb", *CELLS)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(SECONDS)
    with photographing(page, pictures / "failed.png"):
        page.goto(voila.find("/voila/render/app.ipynb"), timeout=2 * SECONDS)
        compare = page.locator(PANEL).filter(has_text="Answers that are").first
        compare.wait_for(timeout=2 * SECONDS)
        first = compare.locator("tbody tr").first
        click_and_wait(compare.get_by_role("button", name="Next"), lambda: first.inner_text().startswith("6\t"))
        layers = find_layers(page)
        preset = press_preset(layers, "Attention only")
        assert preset.after.differs(preset.before)
        assert len(count_cells(layers)) == layers.locator(".fk-cell").count()
        chat = page.locator(PANEL).filter(has_text="max_new_tokens").first
        chat.get_by_label("max_new_tokens").fill("4")
        chat.get_by_label("Message").fill("Which one?")
        chat.get_by_role("button", name="Send").click()
        chat.locator("text=Answered").wait_for()
        assert "Base model:" in chat.inner_text()
        page.screenshot(path=pictures / "voila.png", full_page=True)
        assert find_violations(page) == []
    page.close()
