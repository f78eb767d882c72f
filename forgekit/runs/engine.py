"""papermill's engine `forgekit`: the kernel is supervised, and the notebook on disk says what happened and no more.

`forgekit run` uses it, and `papermill --engine forgekit` finds it by its entry point. Where papermill's own engine marks
the cells of a killed kernel as completed, rewrites the output in place and forgets `raises-exception`, this one does not.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from papermill.engines import Engine, NotebookExecutionManager
from papermill.exceptions import PapermillExecutionError
from papermill.iorw import LocalHandler, papermill_io

from ..files import write_text
from ..run_folder import DONE
from .cells import Client
from .outcome import FAILED, STOPPED, Outcome
from .parameters import insert_parameters
from .session import Session
from .standalone import begin_from_notebook
from .story import tell_end

FRESH_KERNELS = 2  # the batch is halved at most twice


class ForgekitEngine(Engine):
    """Executes a notebook under a Supervisor; `session` comes from `forgekit run`, else the engine makes its own."""

    @classmethod
    def execute_notebook(
        cls,
        nb: Any,
        kernel_name: str,
        output_path: str | None = None,
        progress_bar: bool = True,
        log_output: bool = False,
        autosave_cell_every: int = 30,
        session: Session | None = None,
        **options: Any,
    ) -> Any:
        """Execute and return the notebook; raises PapermillExecutionError when it failed, SystemExit when it was stopped."""
        if session is None:
            session = begin_from_notebook(nb, options.get("input_path"))
            with session.supervisor.catch_signals():
                return cls.execute_notebook(
                    nb, kernel_name, output_path, progress_bar, log_output, autosave_cell_every, session, **options
                )
        if session.parameters:
            insert_parameters(nb)
        keeper = Keeper(output_path) if output_path and is_local(output_path) else None
        how = output_path, log_output, progress_bar, autosave_cell_every
        options |= {"session": session, "keeper": keeper, "log_output": log_output}
        for again in reversed(range(1 + FRESH_KERNELS)):
            recorder = Recorder(copy.deepcopy(nb), *how)
            outcome = cls.execute_once(recorder, kernel_name, session, again > 0, options)
            if not outcome.fresh:
                break
        raise_for(outcome, recorder)
        if keeper:
            keeper.seal()
        return hide_allowed_errors(recorder.nb)

    @classmethod
    def execute_once(
        cls, recorder: "Recorder", kernel_name: str, session: Session, again: bool, options: dict[str, Any]
    ) -> Outcome:
        """Execute in one kernel and write the end; `again`: when it asks for a fresh one, the run goes on instead of ending."""
        recorder.notebook_start()
        outcome = session.outcome  # failed, until the cells say something else
        try:
            outcome = cls.execute_managed_notebook(recorder, kernel_name, **options)
        finally:
            if outcome.fresh and (not again or session.supervisor.stop):
                outcome = replace(outcome, fresh=False)
            try:
                outcome = outcome if outcome.fresh else session.finish(outcome)
            finally:
                recorder.finish(outcome)
        if outcome.fresh:
            session.start_again(outcome)
        return outcome

    @classmethod
    def execute_managed_notebook(
        cls,
        nb_man: Any,
        kernel_name: str,
        session: Session | None = None,
        keeper: "Keeper | None" = None,
        log_output: bool = False,
        start_timeout: int = 60,
        execution_timeout: int | None = None,
        **options: Any,
    ) -> Outcome:
        """Execute the cells and return how it ended."""
        assert session is not None
        options.pop("input_path", None)
        client = Client(
            nb_man,
            kernel_name=kernel_name,
            log_output=log_output,
            startup_timeout=start_timeout,
            timeout=execution_timeout or options.pop("timeout", None),
            iopub_timeout=60,  # on a busy machine a cell's last output comes seconds after its answer
            **options,
        )
        return client.execute_under(session, keeper and keeper.path)


class Recorder(NotebookExecutionManager):
    """papermill's record of an execution, without its last step, which marks every cell that never ran as completed."""

    unsaved: str | None = None  # why the last write failed

    def save(self, **values: Any) -> None:
        """Write the notebook; a full disk is no reason to lose the run, and the next save tries again."""
        try:
            super().save(**values)
            self.unsaved = None
        except OSError as error:
            if self.unsaved is None:
                print(f"The notebook cannot be written now: {error.strerror}. The one on disk is kept.")
            self.unsaved = error.strerror or str(error)
            self.last_save_time = self.now()

    def finish(self, outcome: Outcome) -> None:
        """Write the outcome into the notebook."""
        self.end_time = self.now()
        metadata = self.nb.metadata.papermill
        metadata["end_time"] = self.end_time.isoformat()
        if self.start_time:
            metadata["duration"] = (self.end_time - self.start_time).total_seconds()
        tell_end(self.nb, outcome)
        if outcome.state == DONE:
            self.complete_pbar()
        self.cleanup_pbar()
        self.save()


class Keeper(LocalHandler):
    """papermill's writer for the output: whole or not at all."""

    def __init__(self, output: str):
        super().__init__()
        local = papermill_io.get_handler("local")
        folder = local.cwd(None)  # the only way to ask it is to set it
        local.cwd(folder)
        self.output, self.path = output, Path(folder or ".").absolute() / output
        self.sealed = False
        papermill_io.register(output, self)

    def write(self, buf: str, path: str) -> None:
        """Write the notebook's text; once sealed, leave the next one out."""
        if not self.sealed or path != self.output:
            write_text(self.path if path == self.output else self.path.parent / path, buf)
        self.sealed = False

    def seal(self) -> None:
        """Let the file stay as the engine wrote it: papermill writes what it was given back once more."""
        self.sealed = True


def is_local(path: str) -> bool:
    """Say whether papermill writes this path as a file of this machine."""
    return isinstance(papermill_io.get_handler(path), LocalHandler)


def hide_allowed_errors(notebook: Any) -> Any:
    """Return the notebook as papermill looks through it: it takes an error that `raises-exception` allows for a failure."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.output_type != "error"]
    return notebook


def raise_for(outcome: Outcome, recorder: Recorder) -> None:
    """Raise what papermill's callers expect of a notebook that did not come to its end."""
    if outcome.state == DONE:
        return
    if outcome.state == STOPPED and outcome.number is not None:
        raise SystemExit(outcome.exit_code)
    name, traceback = outcome.state, [outcome.describe()]
    for cell in recorder.nb.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error" and outcome.state == FAILED:
                name, traceback = output.ename, output.traceback
    raise PapermillExecutionError(outcome.cell, outcome.prompt, "", name, outcome.describe(), traceback)
