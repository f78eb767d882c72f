"""One run of a sweep, in the states that sweep.json tells."""

from dataclasses import dataclass
from typing import Any

from ..run_folder import DONE
from ..runs.outcome import CRASHED, FAILED, GATES_FAILED
from .points import Point
from .watch import Watch

# beside the states of a run: not begun, begun, ended because others did better, exit code 2, no machine kept it
WAITING, RUNNING, PRUNED, REFUSED, LOST = "waiting", "running", "pruned", "refused", "lost"
FINAL = (DONE, PRUNED, REFUSED, LOST, FAILED, CRASHED, GATES_FAILED)
RECORD = "sweep.json"


@dataclass
class Entry:
    """A point and how its run stands."""

    point: Point
    watch: Watch
    state: str = WAITING
    attempts: int = 0  # starts by this sweep, those that its machine cut short left out
    losses: int = 0  # machines that were lost under it
    reason: str | None = None
    weak: bool = False  # was asked to end because others did better
    told: int = 0  # the last step that the source has heard of

    def describe(self) -> dict[str, Any]:
        """Return what sweep.json holds of it."""
        return {
            "name": self.point.name,
            "settings": dict(self.point.settings),
            "state": self.state,
            "attempts": self.attempts,
            "reason": self.reason,
        }
