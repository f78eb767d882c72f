"""One headless execution: the run's folder, what its kernel is told, and the end that all its files agree on."""

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import ConfigError, RunError, RunNameError
from ..evaluate.gates import check_gates
from ..paths import check_inside
from ..files import read_json
from ..run_folder import DONE, Run, begin_attempt, check_name, explain_disk, find_run_root, now, open_run
from .inside import VARIABLE as SUPERVISED
from .outcome import FAILED, GATES_FAILED, Outcome
from .parameters import VARIABLE as PARAMETERS_FILE
from .parameters import write_parameters
from .room import free_room, keep_room
from .status import close_status, open_status
from .supervise import Supervisor


@dataclass
class Session:
    """A supervised execution; `run` is None for a notebook that is none of forgekit's."""

    supervisor: Supervisor = field(default_factory=Supervisor)
    run: Run | None = None
    parameters: Path | None = None  # the JSON file with the parameters, under `forgekit run`
    status: list[Path] = field(default_factory=list)
    folder: Path | None = None  # where the notebook runs, when that is not its own folder
    finished: bool = False
    outcome: Outcome = field(default_factory=lambda: Outcome(FAILED, "the notebook could not be executed"))

    def kernel_environment(self, link: socket.socket, notebook: Path | None) -> dict[str, str]:
        """Return the variables of the kernel: this process's, the run, and how it hears from its supervisor."""
        given = {
            "socket": link.fileno(),
            "folder": self.run and str(self.run.path),
            "notebook": notebook and str(notebook),
            "status": [str(path) for path in self.status],
            "grace": self.supervisor.grace,
        }
        values = {SUPERVISED: json.dumps(given), **find_package()}
        if self.run:
            values |= {"FORGEKIT_RUN": self.run.path.name, "FORGEKIT_RUNS": str(self.run.path.parent)}
        if self.parameters:
            values |= {PARAMETERS_FILE: str(self.parameters)}
        # 1: ipykernel's own watch is off; it would end the process before anything could be saved
        return {**os.environ, **values, "JPY_PARENT_PID": "1"}

    def open_files(self) -> tuple[int, ...]:
        """Return the files that the kernel inherits: the lock, so that the folder stays locked until it too has ended."""
        return self.run.open_files() if self.run else ()

    def start_again(self, outcome: Outcome) -> None:
        """Close an attempt whose kernel asked for a fresh one and open the next, in the same folder and under the same lock."""
        print(f"The run {outcome.sentence()}", flush=True)
        if self.run is None:
            return
        self.run.record = read_json(self.run.path / "run.json")
        self.run.update(state=outcome.state, error=outcome.error, finished_at=now())
        self.run.record = begin_attempt(self.run.path)
        self.run.update()
        open_status(self.status)

    def finish(self, outcome: Outcome) -> Outcome:
        """Write the end into run.json and status.json, give the folder free, and return the end with the gates in it."""
        self.finished = True
        self.outcome = outcome
        if self.run is None:
            return outcome
        free_room(self.run.path)
        # the kernel has added settings, scores and exports in the meantime
        self.run.record = read_json(self.run.path / "run.json")
        if outcome.state == DONE:
            self.outcome = outcome = judge_run(self.run)
        close_status(self.status, None if outcome.state == DONE else f"The run {outcome.sentence()}")
        self.run.finish(outcome.state, outcome.error, exit_code=outcome.exit_code, **outcome.for_record())
        return outcome


def judge_run(run: Run) -> Outcome:
    """Judge the gates of a run that came to its end; return which of them failed, if that stops it."""
    gates = check_gates(run)
    action = run.record.get("settings", {}).get("evaluate.gates_action", {}).get("value")
    if gates.held or action != "stop":
        return Outcome()
    return Outcome(GATES_FAILED, f"gates that did not pass: {', '.join(gates.failed)}")


def find_package() -> dict[str, str]:
    """Return PYTHONPATH with this forgekit's folder first, where it is a checkout: the kernel starts in another folder."""
    folder = Path(__file__).absolute().parents[2]
    if not (folder / "pyproject.toml").is_file():
        return {}
    paths = [str(folder), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def begin(config: Config, name: str | int | None, notebook: str, supervisor: Supervisor, folder: Path) -> Session:
    """Open the run's folder and write its first files; `folder` is where the notebook runs.

    Raises RunNameError when the name is taken, RunError when the folder cannot be written.
    """
    root = find_run_root(config.recipe)
    check_resume(config.train.resume, root / str(name or ""))
    run = open_named(root, name, config.train.resume != "never")
    session = Session(supervisor, run, status=[run.path / "status.json"], folder=folder)
    if config.train.status_file:
        session.status.append(folder / Path(config.train.status_file).expanduser())
    try:
        with explain_disk(run.path):
            run.update(notebook=notebook)
            open_status(session.status)
            keep_room(run.path)
    except RunError as error:
        with contextlib.suppress(OSError, RunError):  # what cannot be written cannot be recorded either
            session.finish(Outcome(FAILED, str(error)))
        raise
    return session


def open_named(root: Path, name: str | int | None, resume: bool) -> Run:
    """Open the run of that name, or one named after the time; where two begin in one second, the later counts on."""
    if name:
        return open_run(check_inside(root, check_name(name)), resume)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for ending in ("", *(f"-{number}" for number in range(2, 100))):
        try:
            return open_run(check_inside(root, f"{stamp}{ending}"), False)
        except RunNameError:
            continue
    raise RunNameError(f"{root} holds a hundred runs named {stamp}. Choose a run_name.")


def hand_over(session: Session, given: Mapping[str, Any]) -> None:
    """Write the parameters that the kernel takes."""
    assert session.run is not None
    session.parameters = session.run.path / "parameters.json"
    with explain_disk(session.run.path):
        write_parameters(session.parameters, {**given, "run_name": session.run.path.name})


def check_resume(resume: str, folder: Path) -> None:
    """Raise ConfigError when `train.resume` names a checkpoint that is neither a folder nor one of this run's."""
    if resume in ("auto", "never") or any(path.is_dir() for path in (Path(resume), folder / "checkpoints" / resume)):
        return
    raise ConfigError(f"train.resume is {resume!r}: no such folder. Say auto, never, or the path of a checkpoint.")
