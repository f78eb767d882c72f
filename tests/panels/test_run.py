"""RunPanel shows what the training leaves for it, and its buttons set events and nothing else."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forgekit.panels.run import RunPanel, write_seconds
from forgekit.run_folder import Run
from forgekit.train.progress import Snapshot


class FakeTrainer:
    """A trainer whose training is one function."""

    def __init__(self, training: Callable[[], Any]):
        self.train = training
        self.callback_handler = SimpleNamespace(callbacks=[])
        self.add_callback = self.callback_handler.callbacks.append


def make_panel(training: Callable[["RunPanel"], Any]) -> tuple[RunPanel, FakeTrainer]:
    trainer = FakeTrainer(lambda: training(panel))
    panel = RunPanel(trainer, Run(Path("runs/orders"), {}))
    return panel, trainer


def wait_for(what: Callable[[], bool]) -> None:
    """Wait until the panel's thread has come to it."""
    deadline = time.monotonic() + 5
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_without_anybody_looking_it_is_a_line_and_training_runs_as_ever() -> None:
    panel, trainer = make_panel(lambda panel: "result")
    assert panel._repr_mimebundle_().keys() == {"text/plain"}
    assert repr(panel) == "RunPanel(orders): Not started"
    assert trainer.train() == "result"
    assert repr(panel) == "RunPanel(orders): Completed"
    assert panel.widgets is None


def test_figures_appear_while_training_runs_and_clicks_set_events() -> None:
    seen = {}

    def training(panel: RunPanel) -> None:
        w = panel.widgets
        panel.progress.latest = Snapshot(3, 60, 0.51234, None, 2e-4, 1234.5, 3 * 2**30, 15 * 2**30, True, 2)
        wait_for(lambda: "step 3 of 60" in w.bar.value and "0.5123" in w.table.value)
        seen.update(table=w.table.value, status=w.status.value, enabled=not (w.stop.disabled or w.save.disabled))
        w.save.click()
        assert panel.switch.save.is_set() and not panel.switch.stop.is_set()
        wait_for(lambda: "Saving when this step ends" in w.status.value)
        assert w.save.disabled and not w.stop.disabled
        panel.switch.save.clear()  # as the switch does
        wait_for(lambda: not w.save.disabled)
        w.stop.click()
        assert panel.switch.stop.is_set()
        wait_for(lambda: "Stopping: this step ends" in w.status.value)
        assert w.stop.disabled and w.save.disabled
        panel.switch.stopped_at = 4

    panel, trainer = make_panel(training)
    assert panel.box.children and panel.widgets and panel.widgets.stop.disabled and panel.widgets.save.disabled
    trainer.train()
    assert seen["enabled"] and "orders: Running; newest checkpoint: 2" in seen["status"]
    for value in ("2.00e-04", "1,234", "3.0 of 15.0", "GPU memory, most, GiB"):
        assert value in seen["table"]
    assert "Stopped after step 4" in panel.widgets.status.value and panel.widgets.stop.disabled
    assert not [thread for thread in threading.enumerate() if thread.name == "forgekit-run-panel"]


def test_an_error_ends_the_panels_thread_and_goes_on() -> None:
    def fail(panel: RunPanel) -> None:
        raise RuntimeError("out of <memory>")

    panel, trainer = make_panel(fail)
    assert panel.box
    with pytest.raises(RuntimeError, match="out of <memory>"):
        trainer.train()
    assert panel.widgets and "Ended by RuntimeError: out of &lt;memory&gt;" in panel.widgets.status.value
    assert not [thread for thread in threading.enumerate() if thread.name == "forgekit-run-panel"]


def test_the_switch_of_the_trainer_is_used_and_not_a_second_one() -> None:
    panel, trainer = make_panel(lambda panel: None)
    second = RunPanel(trainer, panel.run)
    assert second.switch is panel.switch


@pytest.mark.parametrize(("seconds", "text"), [(None, ""), (45.4, "45 s"), (150, "2 min"), (7500, "2 h 5 min")])
def test_seconds_are_said_as_people_say_them(seconds: float | None, text: str) -> None:
    assert write_seconds(seconds) == text
