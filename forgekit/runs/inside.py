"""What runs inside of a supervised kernel: it hears "stop", sees that its supervisor is gone, and then saves and ends.

Loaded as an IPython extension before the first cell. ipykernel's own watch over its parent is off, because that one ends
the process within a second and nothing of the notebook runs any more.
"""

import contextlib
import faulthandler
import json
import os
import select
import signal
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from ..link import connect, tell
from ..files import read_json, write_json
from ..run_folder import now
from .outcome import STOPPED, Outcome
from .room import free_room
from .status import close_status
from .story import tell_end, write_notebook

VARIABLE = "FORGEKIT_SUPERVISED"
ORPHANED = Outcome(STOPPED, "the kernel saved what it had and ended", by="the death of its supervisor")
TICK_SECONDS = 0.05
_logs: list[TextIO] = []  # faulthandler writes to a file that has to stay open


def load_ipython_extension(shell: Any) -> None:
    """Start watching; without a supervisor nothing happens."""
    given = json.loads(os.environ.get(VARIABLE) or "null")
    if given is None or given.get("socket") is None:
        return
    os.environ[VARIABLE] = json.dumps(given | {"socket": None})  # this kernel's alone, not its children's
    watcher = Watcher(shell, connect(given["socket"]), given)
    watcher.catch_signals()
    write_stacks_on_request(given.get("folder"))
    threading.Thread(target=watcher.run, name="forgekit-watcher", daemon=True).start()
    tell(ready=True)


def write_stacks_on_request(folder: str | None) -> None:
    """Write every thread's stack to the run's log on SIGUSR1, which needs no Python to run, and on a crash."""
    log: Any = None
    if folder:
        (Path(folder) / "logs").mkdir(parents=True, exist_ok=True)
        log = open(Path(folder) / "logs" / "training.log", "a", encoding="utf-8")  # noqa: SIM115
        _logs.append(log)
    given = {"file": log} if log else {}
    faulthandler.register(signal.SIGUSR1, all_threads=True, **given)
    faulthandler.enable(all_threads=True, **given)


class Watcher:
    """Hears the supervisor and the kernel's own signals, and interrupts the running cell once."""

    def __init__(self, shell: Any, link: socket.socket, given: dict[str, Any]):
        self.link, self.given = link, given
        self.asked = self.interrupted = self.busy = False
        self.wake, self.woken = socket.socketpair()
        shell.events.register("pre_run_cell", lambda info: setattr(self, "busy", True))
        shell.events.register("post_run_cell", lambda result: setattr(self, "busy", False))

    def catch_signals(self) -> None:
        """Let SIGTERM and SIGHUP, which a cluster sends to every process of a job, stop the cell and not the kernel."""

        def note(number: int, frame: Any) -> None:
            tell(stop=number)
            self.wake.send(b".")

        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, note)

    def run(self) -> None:
        """Wait for the supervisor's word, a signal, or the supervisor's end."""
        while True:
            waiting = self.asked and not self.interrupted
            ready, _, _ = select.select([self.link, self.woken], [], [], TICK_SECONDS if waiting else None)
            if self.woken in ready:
                self.woken.recv(64)
                self.asked = True
            if self.link in ready:
                if not self.link.recv(4096):
                    return self.end_alone()
                self.asked = True  # there is one word: stop
            self.interrupt()

    def interrupt(self) -> None:
        """Send the interrupt that a person would send, once, at a moment when a cell listens.

        Training answers it at the end of its step, with a checkpoint; any other code gets KeyboardInterrupt. Between
        cells the kernel ignores interrupts.
        """
        if self.asked and not self.interrupted and callable(signal.getsignal(signal.SIGINT)):
            self.interrupted = True
            # to the main thread by name: another one may get what is sent to the process, and a sleeping main thread
            # would not wake up (seen with a second signal pending)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def end_alone(self) -> None:
        """End the cell, say so in the run's files, and end this process and all that it started."""
        self.asked = True
        deadline = time.monotonic() + (self.given.get("grace") or 30.0)
        while self.busy and time.monotonic() < deadline:
            self.interrupt()
            time.sleep(TICK_SECONDS)
        with contextlib.suppress(Exception):  # whatever is wrong with the files, the process has to end
            close_files(self.given)
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(1)


def close_files(given: dict[str, Any]) -> None:
    """Write the end into run.json, status.json and the notebook, as the supervisor would have done."""
    folder = Path(given["folder"]) if given.get("folder") else None
    record = read_json(folder / "run.json") if folder else {}
    if record.get("state", "running") != "running":  # the notebook had come to its end
        return
    if folder:
        free_room(folder)
    outcome = mend_notebook(Path(given["notebook"])) if given.get("notebook") else ORPHANED
    close_status(map(Path, given.get("status", ())), f"The run {outcome.sentence()}")
    if folder:
        end = {"state": outcome.state, "error": outcome.error, "finished_at": now()}
        write_json(folder / "run.json", record | end | outcome.for_record())


def mend_notebook(path: Path) -> Outcome:
    """Mark the cell that was running in the notebook on disk; return the end with that cell in it."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    statuses = [cell.metadata.get("papermill", {}).get("status") for cell in notebook.cells]
    cell = statuses.index("running") if "running" in statuses else None
    prompt = None if cell is None else notebook.cells[cell].get("execution_count")
    outcome = replace(ORPHANED, cell=cell, prompt=prompt)
    tell_end(notebook, outcome)
    write_notebook(notebook, path)
    return outcome
