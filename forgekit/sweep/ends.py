"""What a run's exit code says, and whether its end was an accident after which it may go on."""

import signal
from typing import Any

from ..runs.outcome import CRASHED, STOPPED
from ..runs.supervise import HUNG
from .job import TERMINATED, End

USAGE_CODE, GATES_CODE = 2, 3  # of `forgekit run`
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
