"""What a sweep and a backend say to each other: one job is one supervised headless run with a folder of its own."""

import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..errors import RunError

TERMINATED = 128 + signal.SIGTERM  # exit code of a run that was asked to end


@dataclass(frozen=True)
class Job:
    """One `forgekit run`, made anywhere that sees the run root.

    Attributes:
        name: the run's name; its folder is `root / name`. Starting the same name again resumes it.
        root: the run root, absolute, on a file system that every machine of the backend shares.
        arguments: what follows `python -m forgekit`, for instance ["run", "notebooks/01_text.ipynb", "--name", name].
        folder: the working folder, absolute.
        environment: variables on top of the backend's own, `FORGEKIT_RUNS` among them.
        gpus: how many GPUs the run needs; 0 runs on the CPU.
        log: the file that what the run prints is added to; None leaves that to the backend.
    """

    name: str
    root: Path
    arguments: tuple[str, ...]
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    gpus: int = 0
    log: Path | None = None


@dataclass(frozen=True)
class End:
    """How a job ended. `code` is the exit code of `forgekit run`; None: its machine was lost, `reason` says how."""

    code: int | None
    reason: str | None = None


class Backend(Protocol):
    """A place where jobs run. Every method returns at once and is called by one thread."""

    def start(self, job: Job) -> None:
        """Start or queue a job. Raises RunError when the place cannot be reached or could never run it."""

    def free(self) -> int:
        """Return how many more jobs may be started now; those beyond wait with the sweep, so that a search can still choose."""

    def poll(self) -> dict[str, End]:
        """Return the jobs that have ended since the last call, by name."""

    def stop(self, name: str) -> None:
        """Ask a job to end as SIGTERM does: it saves a checkpoint. Its end comes by `poll`.

        Raises RunError when it cannot be told now, for instance because the disk is full.
        """

    def close(self) -> None:
        """Let go of the place; jobs that still run are asked to stop and waited for."""


def stop_all(names: Iterable[str], stop: Callable[[str], None]) -> list[str]:
    """Ask jobs to end; return those that could not be told, to be asked again."""
    left = []
    for name in names:
        try:
            stop(name)
        except RunError:
            left.append(name)
    return left
