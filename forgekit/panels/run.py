"""RunPanel: how far the training is, and the two things a person can ask of it, Stop and Save now."""

import functools
import html
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from ..hardware import GIB
from ..run_folder import Run
from .view import PANEL, make_bundle, say

TICK_SECONDS = 0.25  # at most four updates a second, and the longest that a click waits for its answer


class RunPanel:
    """Progress, losses, speed, memory and time left of a training, with Stop and Save now; works while its cell runs.

    Make it before `trainer.train()`, as the last line of a cell. Three threads meet here, and each keeps to its own: the
    training thread leaves a Snapshot after each step, a click sets an event of the StopSwitch, and a thread of the panel
    reads both and is the only one that changes a widget. So a click is answered at once, also in the middle of a long step.

    Where clicks wait for the end of the cell (ipykernel 6, which Colab has), the notebook's Interrupt does what Stop does.
    """

    def __init__(self, trainer: Any, run: Run):
        """Watch a trainer, from `sft_trainer` or any other of transformers."""
        from ..train.progress import Progress
        from ..train.stop import StopSwitch

        self.run = run
        self.progress = find_callback(trainer, Progress, Progress)
        self.switch = find_callback(trainer, StopSwitch, lambda: StopSwitch(run))
        self.widgets: SimpleNamespace | None = None
        self.state = "Not started"
        self.running = False
        self.finished = threading.Event()
        self.watch(trainer)

    def __repr__(self) -> str:
        figures = "".join(f", {name} {value}" for name, value in self.figures() if value)
        return f"RunPanel({self.run.path.name}): {self.describe_state()}{figures}"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return make_bundle(lambda: self.box, repr(self))

    @functools.cached_property
    def box(self) -> Any:
        """The panel's outermost widget."""
        import ipywidgets as widgets

        status, bar, table = widgets.HTML(), widgets.HTML(), widgets.HTML()
        stop = widgets.Button(description="Stop", tooltip="Save a checkpoint, then end training")
        save = widgets.Button(description="Save now", tooltip="Save a checkpoint and go on")
        stop.on_click(lambda button: self.switch.stop.set())
        save.on_click(lambda button: self.switch.save.set())
        self.widgets = SimpleNamespace(status=status, bar=bar, table=table, stop=stop, save=save)
        self.show()
        box = widgets.VBox([status, bar, table, widgets.HBox([stop, save])])
        box.add_class(PANEL)
        return box

    # ---- training ---------------------------------------------------------------------------------------------------

    def watch(self, trainer: Any) -> None:
        """Let `trainer.train` start and end the panel's thread, however training ends."""
        train = trainer.train

        @functools.wraps(train)
        def train_and_show(*args: Any, **kwargs: Any) -> Any:
            with self.showing():
                return train(*args, **kwargs)

        trainer.train = train_and_show

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Update the panel while the block runs, and once more at its end."""
        self.state, self.running = "Running", True
        self.finished.clear()
        thread = threading.Thread(target=self.update, name="forgekit-run-panel", daemon=True)
        thread.start()
        try:
            yield
            self.state = (
                "Completed" if self.switch.stopped_at is None else f"Stopped after step {self.switch.stopped_at}"
            )
        except BaseException as error:
            self.state = f"Ended by {type(error).__name__}: {error}".rstrip(": ")
            raise
        finally:
            self.running = False
            self.finished.set()
            thread.join()
            self.progress.close()

    def update(self) -> None:
        """Show what is new, until training has ended; runs in the panel's thread."""
        while not self.finished.wait(TICK_SECONDS):
            self.show()
        self.show()

    # ---- what is shown ----------------------------------------------------------------------------------------------

    def show(self) -> None:
        """Bring the widgets to what is known. One that shows it already is not sent again."""
        if self.widgets is None:  # nobody looks
            return
        w = self.widgets
        stopping, saving = self.switch.stop.is_set(), self.switch.save.is_set()
        w.status.value = say(f"{self.run.path.name}: {self.describe_state()}")
        w.bar.value = self.write_bar()
        w.table.value = write_figures(self.figures())
        w.stop.disabled = not self.running or stopping
        w.save.disabled = not self.running or stopping or saving

    def describe_state(self) -> str:
        """Return one sentence."""
        checkpoint = self.progress.latest.checkpoint
        newest = "" if checkpoint is None else f"; newest checkpoint: {checkpoint}"
        if self.running and self.switch.stop.is_set():
            return f"Stopping: this step ends, a checkpoint is saved{newest}"
        if self.running and self.switch.save.is_set():
            return f"Saving when this step ends{newest}"
        return f"{self.state}{newest}"

    def write_bar(self) -> str:
        """Return the bar and the step beside it."""
        now = self.progress.latest
        bar = f"<progress aria-label='training steps' value='{now.step}' max='{now.total or 1}' style='width:60%'></progress>"
        return f"<div>{bar} <span class='forgekit-step'>step {now.step} of {now.total or '?'}</span></div>"

    def figures(self) -> list[tuple[str, str]]:
        """Return names and values of what is measured; an empty value is not known yet."""
        now = self.progress.latest
        eta = self.progress.eta_seconds if self.running else None
        used = "" if now.memory is None else f"{now.memory / GIB:.1f}"
        of = f" of {now.memory_total / GIB:.1f}" if now.memory_total else ""
        return [
            ("loss", write_number(now.loss, ".4f")),
            ("held-out loss", write_number(now.held_out_loss, ".4f")),
            ("learning rate", write_number(now.learning_rate, ".2e")),
            ("tokens a second", write_number(now.tokens_per_second, ",.0f")),
            ("GPU memory, most, GiB" if now.on_gpu else "memory, GiB", f"{used}{of}" if used else ""),
            ("time left", write_seconds(eta)),
        ]


def find_callback(trainer: Any, kind: type, make: Callable[[], Any]) -> Any:
    """Return a trainer's callback of a kind; one of another library's making gets a new one."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, kind):
            return callback
    made = make()
    trainer.add_callback(made)
    return made


def write_number(value: float | None, form: str) -> str:
    """Return a number in a format, or nothing."""
    return "" if value is None else format(value, form)


def write_seconds(seconds: float | None) -> str:
    """Return a duration as a person says it: 45 s, 3 min, 2 h 5 min; or nothing."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def write_figures(figures: list[tuple[str, str]]) -> str:
    """Return name above value, side by side as far as there is room."""
    cells = "".join(
        f"<li style='list-style:none;margin:4px 24px 4px 0'>{html.escape(name)}<br><b>{html.escape(value) or '–'}</b></li>"
        for name, value in figures
    )
    return f"<ul style='display:flex;flex-wrap:wrap;margin:0;padding:0;line-height:1.4'>{cells}</ul>"
