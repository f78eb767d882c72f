"""Ends training early without losing it: a button or an interrupt asks, the end of the optimiser step answers."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..run_folder import Run

STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopSwitch(TrainerCallback):
    """Two events that any thread may set: `stop` (save a checkpoint, then end training) and `save` (a checkpoint only).

    They are looked at where an optimiser step has ended, because a checkpoint from the middle of one does not resume
    exactly. `stopped_at` is the step that training was stopped after, or None.
    """

    def __init__(self, run: Run, say: Callable[[str], None] = print):
        self.run, self.say = run, say
        self.stop, self.save = threading.Event(), threading.Event()
        self.stopped_at: int | None = None
        self.scored_at: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget an earlier training; what was asked since this one was started stays."""
        self.stopped_at = self.scored_at = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask transformers for a checkpoint, and for the end when that is wanted and not reached anyway."""
        if self.stop.is_set() and state.global_step < state.max_steps:
            self.stopped_at = state.global_step
            control.should_training_stop = True
        control.should_save |= self.stop.is_set() or self.save.is_set()
        self.save.clear()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note which weights were scored."""
        self.scored_at = state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Score the last weights too, where the run scores at all: the best ones are put back at the end of training.

        The checkpoint has been written before, so an interrupt while scoring costs nothing; it is written again because
        only a save makes transformers remember which one is the best.
        """
        if self.stopped_at is not None and args.eval_strategy != "no" and self.scored_at != state.global_step:
            control.should_evaluate = control.should_save = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say where training was stopped, and put it into run.json."""
        self.stop.clear()
        if self.stopped_at is None:
            return
        self.run.update(stopped_at_step=self.stopped_at)
        best = state.best_model_checkpoint and Path(state.best_model_checkpoint).name
        kept = f" The model now has the weights of {best}, the best on held-out rows." if best else ""
        self.say(
            f"Stopped as asked after step {self.stopped_at} of {state.max_steps}; "
            f"checkpoint-{self.stopped_at} is complete.{kept}"
        )


@contextlib.contextmanager
def catch_interrupt(switch: StopSwitch) -> Iterator[None]:
    """Make the first interrupt (Ctrl-C, the notebook's Interrupt) or SIGTERM do what Stop does; the second ends training at once.

    Signals reach the main thread alone, and one that is ignored (`nohup`) stays ignored.
    """
    main = threading.current_thread() is threading.main_thread()
    before: dict[int, Any] = {number: signal.getsignal(number) for number in STOPPING} if main else {}
    caught = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def ask(number: int, frame: Any) -> None:
        handler = caught[number]
        signal.signal(number, handler)
        switch.stop.set()
        if callable(handler) and handler is not signal.default_int_handler:  # a supervised kernel tells its supervisor
            handler(number, frame)

    for number in caught:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in caught.items():
            signal.signal(number, handler)
        switch.stop.clear()
        switch.save.clear()
