"""Executes a notebook's cells one by one in a kernel that a Supervisor watches, and says how it ended."""

import asyncio
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from papermill.clientwrap import PapermillNotebookClient

from ..errors import FreshProcessError
from .crash import MemoryKills, describe_crash
from .outcome import FAILED, STOPPED, Outcome
from .session import Session
from .supervise import Supervisor

# for a kernel that is idle and has only to leave, until it is killed; it waits for each of its children in turn
SHUTDOWN_SECONDS, HURRIED_SECONDS = 30.0, 3.0
EXTENSION = "forgekit.runs.inside"


class Client(PapermillNotebookClient):
    """papermill's client with a kernel that outlives its parent long enough to save, and cells that tell what happened."""

    supervisor: Supervisor
    process: subprocess.Popen
    extra_arguments: list[str]
    memory: MemoryKills

    def __init__(self, nb_man: Any, **options: Any):
        super().__init__(nb_man, config=encrypt_connection(), kernel_manager_class=quiet_manager(), **options)

    def execute_under(self, session: Session, notebook: Path | None) -> Outcome:
        """Execute all cells in a kernel of this session; `notebook` is the file that the kernel mends when it is left alone."""
        self.supervisor = session.supervisor
        self.reset_execution_trackers()
        try:
            with self.supervised_kernel(session, notebook):
                outcome = self.execute_cells()
                if self.supervisor.stop and self.km:
                    self.km.shutdown_wait_time = HURRIED_SECONDS
        except RuntimeError as error:  # it died before its first answer, or does not start in time
            if self.supervisor.stop is None:
                return Outcome(FAILED, f"the kernel did not start: {' '.join(str(error).split())}")
            return self.describe_stop()
        self.set_widgets_metadata()
        return outcome

    @contextmanager
    def supervised_kernel(self, session: Session, notebook: Path | None) -> Iterator[None]:
        """Start the kernel with its end of a socket, and shut it down after the block."""
        ours, theirs = socket.socketpair()
        km = self.create_kernel_manager()
        if km.ipykernel:
            self.extra_arguments = [*self.extra_arguments, f"--InteractiveShellApp.extra_extensions={EXTENSION}"]
        start = {
            "env": session.kernel_environment(theirs, notebook),
            "independent": True,
            "pass_fds": (theirs.fileno(), *session.open_files()),
        }
        with ours, theirs, self.supervisor.watch(ours), self.setup_kernel(**start):
            theirs.close()
            self.process = km.provisioner.process
            self.memory = MemoryKills(self.process.pid)
            self.supervisor.pid = self.process.pid
            yield

    def execute_cells(self) -> Outcome:
        """Execute until the end, an error, a dead kernel, or somebody asks to stop."""
        for index, cell in enumerate(self.nb.cells):
            if self.supervisor.stop:
                break
            self.supervisor.cell_begins()
            self.nb_man.cell_start(cell, index)
            outcome = self.execute_one(cell, index)
            self.supervisor.cell_ended()
            if outcome:
                self.nb_man.cell_exception(self.nb.cells[index], cell_index=index)
            self.nb_man.cell_complete(self.nb.cells[index], cell_index=index)
            if outcome:
                return outcome
        if self.supervisor.stop:
            return self.describe_stop()
        try:
            answer = self.wait_for_reply(self.kc.kernel_info())
        except DeadKernelError:
            return self.describe_death(None, None)
        self.nb.metadata["language_info"] = answer["content"]["language_info"]
        return Outcome()

    def execute_one(self, cell: Any, index: int) -> Outcome | None:
        """Execute one cell; return the run's outcome when it ends here."""
        try:
            self.execute_cell(cell, index)
        except CellExecutionError as error:
            words = " ".join(f"{error.ename}: {error.evalue}".split())
            return self.describe_error(error.ename, words, index, self.number(cell))
        except CellTimeoutError as error:
            words = f"cell {cell.get('execution_count')}: {str(error).splitlines()[0]}"
            return Outcome(FAILED, words, cell=index, prompt=self.number(cell))
        except DeadKernelError:
            outcome = self.describe_death(index, self.number(cell))
            cell.outputs.append(make_error("DeadKernelError", outcome.describe()))
            return outcome
        return None

    def number(self, cell: Any) -> int:
        """Return what stands in the cell's In [ ]; a kernel that died at once had no time to say."""
        return cell.get("execution_count") or self.code_cells_executed

    def describe_error(self, name: str, words: str, index: int, prompt: int | None) -> Outcome:
        """Return the outcome of a cell that raised: stopped when that was asked for, else failed."""
        if self.supervisor.stop:
            return self.describe_stop(None if name == "KeyboardInterrupt" else f"cell {prompt}: {words}", index, prompt)
        if name == "KeyboardInterrupt":
            return Outcome(STOPPED, None, by="an interrupt of its kernel", cell=index, prompt=prompt)
        fresh = name == FreshProcessError.__name__
        return Outcome(FAILED, f"cell {prompt}: {words}", cell=index, prompt=prompt, fresh=fresh)

    def describe_death(self, index: int | None, prompt: int | None) -> Outcome:
        """Return the outcome of a kernel that is gone."""
        if self.supervisor.stop:
            return self.describe_stop(self.supervisor.killed or "the kernel died while it stopped", index, prompt)
        crash = describe_crash(self.process.poll(), self.memory)
        return Outcome(crash.state, crash.error, number=crash.number, cell=index, prompt=prompt)

    def describe_stop(self, error: str | None = None, index: int | None = None, prompt: int | None = None) -> Outcome:
        """Return the outcome of a run that was asked to stop."""
        stop = self.supervisor.stop
        assert stop is not None
        return Outcome(STOPPED, error, by=stop.by, number=stop.number, cell=index, prompt=prompt)


def make_error(name: str, words: str) -> Any:
    """Return an error as a cell shows it."""
    from nbformat.v4 import new_output

    return new_output("error", ename=name, evalue=words, traceback=[f"{name}: {words}"])


def encrypt_connection() -> Any:
    """Return traitlets' Config that lets the kernel encrypt its connection; without it the kernel warns that it does not.

    An older jupyter_client knows neither the setting nor the warning.
    """
    from jupyter_client import KernelManager
    from traitlets.config import Config as Traits

    known = "transport_encryption" in KernelManager.class_trait_names()
    return Traits({"KernelManager": {"transport_encryption": "auto"}} if known else {})


def quiet_manager() -> type:
    """Return a kernel manager that shuts an idle kernel down without interrupting it first.

    The interrupt would come right behind the last answer; a kernel still busy with that reports an error after a run
    that went well.
    """
    from jupyter_client.manager import AsyncKernelManager

    class QuietManager(AsyncKernelManager):
        def __init__(self, **options: Any):
            super().__init__(**options)
            self.shutdown_wait_time = SHUTDOWN_SECONDS

        async def _async_interrupt_kernel(self) -> None:
            if self.shutting_down:
                await asyncio.sleep(0)
                return
            await super()._async_interrupt_kernel()

    return QuietManager
