"""What the browser tests do with the layer panel: switch a tower, type a range, press a preset, read totals and times."""

import re
import time
from dataclasses import dataclass
from typing import Any

from .pages import click_and_wait

# From a click to the moment when the page holds other totals, in milliseconds, by the page's own clock
CLICK = """(button) => new Promise((answer, fail) => {
    const panel = button.closest('.fk-panel');
    const read = () => panel.querySelector('.fk-totals')?.textContent;
    const before = read();
    const start = performance.now();
    const look = new MutationObserver(() => {
        if (read() === before) return;
        look.disconnect();
        answer(performance.now() - start);
    });
    look.observe(panel, { subtree: true, childList: true, characterData: true });
    setTimeout(() => fail(new Error('no new totals in 20 s')), 20000);
    button.click();
})"""

SETTLE_SECONDS = 10


@dataclass(frozen=True)
class Totals:
    """The totals that a layer panel shows."""

    modules: int
    parameters: int
    percent: float
    memory: float  # GiB

    def differs(self, other: "Totals") -> bool:
        """Say whether modules, parameters and percent are all others."""
        return all(getattr(self, name) != getattr(other, name) for name in ("modules", "parameters", "percent"))


def find_layers(page: Any) -> Any:
    """Return the notebook's first layer panel."""
    return page.locator(".fk-panel").first


def read_totals(panel: Any) -> Totals:
    text = panel.locator(".fk-totals").inner_text()
    found = re.search(r"([\d,]+) modules learn · ([\d,]+) parameters \(([\d.]+)%", text)
    memory = re.search(r"Predicted peak memory ([\d.]+) of", panel.inner_text())
    assert found and memory, text
    modules, parameters = (int(found[number].replace(",", "")) for number in (1, 2))
    return Totals(modules, parameters, float(found[3]), float(memory[1]))


@dataclass(frozen=True)
class Change:
    """One action on the panel."""

    before: Totals
    after: Totals
    seconds: float
    words: str  # the line on the last change


def act(panel: Any, button: Any) -> Change:
    """Do something to the panel, and return the totals before and after."""
    before, old = read_totals(panel), panel.locator(".fk-totals").inner_text()
    seconds = click_and_wait(button, lambda: panel.locator(".fk-totals").inner_text() not in ("", old))
    panel.locator("text=/Last change: [+-]/").wait_for()
    return Change(before, read_totals(panel), seconds, panel.locator("text=/Last change:/").inner_text())


class Typed:
    """A range typed on the keyboard into the field for layers; `click` because it is used in a button's place."""

    def __init__(self, panel: Any, text: str) -> None:
        self.panel, self.text = panel, text

    def click(self) -> None:
        self.panel.get_by_label("Layers that learn").focus()
        keyboard = self.panel.page.keyboard
        keyboard.press("Control+a")
        keyboard.type(self.text)
        keyboard.press("Enter")


def switch_tower(panel: Any, name: str) -> Change:
    return act(panel, panel.get_by_role("checkbox", name=name, exact=True))


def press_preset(panel: Any, name: str) -> Change:
    return act(panel, panel.get_by_role("button", name=name, exact=True))


def type_layers(panel: Any, text: str) -> Change:
    return act(panel, Typed(panel, text))


def count_cells(panel: Any) -> list[int]:
    """Return the layers that the strip shows as learning; cells are coloured one by one, so once two looks in a row agree."""
    found, before = read_cells(panel), None
    deadline = time.monotonic() + SETTLE_SECONDS
    while found != before and time.monotonic() < deadline:
        panel.page.wait_for_timeout(300)
        found, before = read_cells(panel), found
    return found


def read_cells(panel: Any) -> list[int]:
    """Return the layers that the strip shows as learning at this moment, read in one go."""
    texts: list[str] = panel.locator(".fk-cell.fk-on").all_inner_texts()
    return [int(text.split()[0]) for text in texts]


def time_click(button: Any) -> float:
    """Return the milliseconds from a click in the page to new totals in the page."""
    return button.evaluate(CLICK)
