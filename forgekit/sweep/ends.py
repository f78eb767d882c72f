"""What a run's exit code says, and whether its end was an accident after which it may go on."""

import signal
from pathlib import Path
from typing import Any

from ..run_folder import DONE
from ..runs.outcome import CRASHED, FAILED, GATES_FAILED, STOPPED
from ..runs.supervise import HUNG
from .entry import FINAL, LOST, PRUNED
from .job import TERMINATED, End
from .plan import read_state

KILLED = 128 + signal.SIGKILL


def is_accident(end: End, record: dict[str, Any]) -> bool:
    """Say whether a run may go on: it failed, crashed, hung, or its process was killed, and nobody asked it to stop."""
    if end.code is None:
        return False
    if str(record.get("stopped_by", "")).startswith(HUNG):
        return True
    if end.code == TERMINATED and record.get("state") != CRASHED:
        return False  # somebody stopped it, maybe before it could say so: a job that was cancelled leaves no record
    return record.get("state") != STOPPED or end.code == KILLED


def name_end(end: End, record: dict[str, Any]) -> str:
    """Return the state of a run that does not go on."""
    if end.code is None:
        return LOST
    if record.get("state") in (STOPPED, CRASHED):
        return str(record["state"])
    return STOPPED if end.code == TERMINATED else FAILED  # stopped before it could write anything


def read_ended(folder: Path, only_missing: bool) -> str | None:
    """Return the end that a run's own record tells, also when a sweep was killed before it heard of it, or None.

    With `only_missing` a run that did not pass its gates is to be tried again.
    """
    state = read_state(folder)
    return state if state == DONE or state == GATES_FAILED and not only_missing else None


def find_kept(folder: Path, before: str | None, pruned: bool, only_missing: bool) -> str | None:
    """Return the state of a run that needs nothing more, or None; `before` is what an earlier call told of it."""
    ended = read_ended(folder, only_missing)
    if ended or pruned:
        return ended or PRUNED
    return before if before in FINAL and before not in (DONE, PRUNED) and not only_missing else None


def read_last_words(log: Path) -> str | None:
    """Return the last line that a run printed."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return None
    return next((line.strip() for line in reversed(lines) if line.strip()), None)
