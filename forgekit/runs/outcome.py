"""How an executed notebook ended, as run.json, the notebook and the exit code tell it."""

import signal
from dataclasses import dataclass
from typing import Any

from .. import exit_codes
from ..run_folder import DONE

FAILED, STOPPED, CRASHED, GATES_FAILED = "failed", "stopped", "crashed", "gates_failed"


@dataclass(frozen=True)
class Outcome:
    """The end of a run. `cell` is the position of the cell in which it ended, `prompt` the number that In [ ] shows."""

    state: str = DONE
    error: str | None = None
    by: str | None = None  # who stopped it
    number: int | None = None  # the signal that stopped it or killed its kernel
    cell: int | None = None
    prompt: int | None = None
    fresh: bool = False  # memory ran out, and a fresh kernel goes on with a smaller batch

    def describe(self) -> str:
        """Return one sentence without the state."""
        who = f"by {self.by}" if self.by else ""
        return ": ".join(part for part in (who, self.error) if part)

    def sentence(self) -> str:
        """Return "failed: ...", "was stopped by SIGTERM." or "crashed: ...", which continues "The run"."""
        verb = {STOPPED: "was stopped", GATES_FAILED: "did not pass its gates"}.get(self.state, self.state)
        joint = " " if self.by else ": "
        words = f"{verb}{joint}{self.describe()}" if self.describe() else verb
        return words if words.endswith((".", "?")) else f"{words}."

    def for_record(self) -> dict[str, Any]:
        """Return what run.json holds beside state and error."""
        values = {"stopped_by": self.by, "signal": self.number and name_signal(self.number), "cell": self.prompt}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def exit_code(self) -> int:
        """The command's exit code: 0 completed, 1 failed, 3 gates, 128 + n for signal n."""
        if self.number is not None and self.state in (STOPPED, CRASHED):
            return 128 + self.number
        return {DONE: exit_codes.COMPLETED, GATES_FAILED: exit_codes.GATES_FAILED}.get(self.state, exit_codes.FAILED)


def name_signal(number: int) -> str:
    """Return a signal's name, or its number where it has none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
