"""status.json before training has begun and after it broke off; in between the training itself writes it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..files import read_json, write_json
from ..run_folder import now

# the names that other programs look for, with the values of a run that has not begun to train
FIELDS: dict[str, Any] = {
    "running": True,
    "step": 0,
    "total_steps": None,
    "epoch": None,
    "total_epochs": None,
    "loss": None,
    "learning_rate": None,
    "eta_seconds": None,
    "started_at": None,
    "checkpoint_at": None,
    "error": None,
}


def open_status(paths: Iterable[Path]) -> None:
    """Write that a run has begun, so that nobody takes an earlier run's file for this one's."""
    for path in paths:
        write_json(path, FIELDS | {"started_at": now()})


def close_status(paths: Iterable[Path], error: str | None) -> None:
    """Write that nothing runs any more, where the file still says so: a killed kernel cannot."""
    for path in paths:
        try:
            status = read_json(path)
        except RunError:  # never written, or taken away by a program that polls it
            continue
        if status.get("running") or (error and not status.get("error")):
            write_json(path, status | {"running": False, "error": error})
