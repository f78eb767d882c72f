"""One run of a sweep, in the states that sweep.json tells."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..run_folder import DONE
from ..runs.outcome import CRASHED, FAILED, GATES_FAILED, STOPPED
from .points import Point
from .watch import Watch

# beside the states of a run: not begun, begun, ended because others did better, exit code 2, no machine kept it
WAITING, RUNNING, PRUNED, REFUSED, LOST = "waiting", "running", "pruned", "refused", "lost"
FINAL = (DONE, PRUNED, REFUSED, LOST, FAILED, CRASHED, GATES_FAILED)
ENDED = (DONE, GATES_FAILED)  # came to its end, and was scored
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
    last_step: int | None = None  # at which its training ends, where the settings say so
    refused: int = 0  # how often the backend could not start it
    probed: float = -math.inf  # when its folder was last looked at for another process (monotonic seconds)

    def describe(self) -> dict[str, Any]:
        """Return what sweep.json holds of it."""
        return {
            "name": self.point.name,
            "settings": dict(self.point.settings),
            "state": self.state,
            "attempts": self.attempts,
            "reason": self.reason,
        }


def describe_runs(entries: Mapping[str, Entry], before: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what sweep.json holds of all runs: those of this call, then those that it has not come to yet.

    `before` is what an earlier call told of each; none of its runs goes on now.
    """
    runs = [entry.describe() for entry in entries.values()]
    rest = [run for name, run in before.items() if name not in entries]
    return runs + [run | ({"state": STOPPED} if run["state"] == RUNNING else {}) for run in rest]
