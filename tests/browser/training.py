"""What the browser tests do with a training: watch the run panel's counter, save, stop, and read what is on the disk."""

import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from .conftest import SECONDS
from .pages import click_and_wait, find_panel, find_violations, is_running

CELL = "result = trainer.train()"
ANSWER_SECONDS = 2.0  # the longest that a click may wait while a cell runs
STEPS = 2000  # more than are reached: Stop ends the training
SHORT = {"data.train": 64, "data.validation": 4, "data.test": 12, "train.max_steps": STEPS, "train.eval_steps": 1000, "train.logging_steps": 1, "train.per_device_train_batch_size": 4, "evaluate.rows": 12, "evaluate.max_new_tokens": 4, "export.formats": ["adapter"]}  # fmt: skip
COMPLETE = {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}  # fmt: skip


@dataclass(frozen=True)
class Watched:
    """What was seen of a training that was stopped."""

    steps: list[int]  # as the panel showed them
    seconds: dict[str, float]  # button -> until the click was answered
    busy: list[bool]  # whether the training cell ran just before each click
    violations: list[str]  # while training ran


def read_step(panel: Any) -> int:
    found = re.match(r"step (\d+) of", panel.locator(".forgekit-step").inner_text())
    return int(found.group(1)) if found else 0


def watch_training(page: Any, picture: Path | None = None) -> Watched:
    """Wait for the training cell, see the counter move, press Save now and Stop; come back when training has stopped."""
    panel = find_panel(page, "tokens a second")
    panel.wait_for(timeout=2 * SECONDS)
    status, steps, busy = panel.locator("[role=status]"), [0], []
    deadline = time.monotonic() + 60
    while len(steps) < 4 and time.monotonic() < deadline:
        step = read_step(panel)
        steps += [step] if step != steps[-1] else []
        time.sleep(0.1)
    panel.scroll_into_view_if_needed()
    seconds = {}
    violations: list[str] = []
    for name, words in (("Save now", "Saving|newest checkpoint"), ("Stop", "Stopp")):
        busy.append(is_running(page, CELL))
        button = panel.get_by_role("button", name=name, exact=True)
        seconds[name] = click_and_wait(button, lambda words=words: bool(re.search(words, status.inner_text())))
        if name == "Save now":
            panel.locator("text=newest checkpoint").wait_for()
            violations = find_violations(page)
            if picture:
                page.screenshot(path=picture)
    panel.locator("text=Stopped after step").wait_for()
    return Watched(steps[1:], seconds, busy, violations)


def read_stop(page: Any) -> tuple[int, int]:
    """Return the step after which training stopped, and the newest checkpoint's, as the panel says them."""
    status = find_panel(page, "tokens a second").locator("[role=status]").inner_text()
    found = re.search(r"Stopped after step (\d+); newest checkpoint: (\d+)", status)
    assert found, status
    return int(found[1]), int(found[2])


def list_checkpoints(run: Path) -> dict[int, set[str]]:
    """Return step -> the names of a checkpoint's files."""
    folders = (run / "checkpoints").glob("checkpoint-*")
    return {int(folder.name.split("-")[1]): {file.name for file in folder.iterdir()} for folder in folders}


def count_parameters(run: Path, step: int) -> int:
    """Count the numbers in a checkpoint's adapter."""
    with safe_open(run / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors", "np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
