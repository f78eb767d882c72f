"""A notebook from start to end without a browser: papermill executes it, the run's folder keeps what it printed."""

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from ..config import load_config, read_settings
from ..environment import set_environment
from ..recipe import find_recipes
from ..files import write_text
from ..run_folder import Run, check_name
from ..scrub import remove_tokens
from .outcome import Outcome
from .parameters import find_here, find_parameters
from .session import Session, begin, hand_over
from .supervise import Supervisor


def run_notebook(
    notebook: Path,
    recipe: str | None,
    settings: Mapping[str, Any],
    name: str | None = None,
    timeout: float | None = None,
    grace: float | None = None,
    folder: Path | None = None,
) -> Run:
    """Execute a notebook in its own kernel and keep it, as notebook and as HTML, in the run's folder.

    Args:
        notebook: one with a cell tagged `parameters`.
        recipe: the recipe to use instead of the notebook's own.
        settings: dotted names on top of the recipe.
        name: the run's name; None takes the notebook's own, else the time. A run of that name that did not complete goes
            on, unless `train.resume` is never.
        timeout: seconds after which the run is asked to stop.
        grace: seconds from being asked to stop to having ended; None: the longer of 30 and two steps.
        folder: where the notebook runs; None: its own folder.

    Returns the run; its record holds the state (completed, failed, stopped, crashed, gates_failed) and the exit code.
    What the cells print appears as it comes.

    Raises:
        ConfigError, RunError: before the kernel starts, when a setting, the notebook or the name is wrong.
    """
    set_environment()
    parameters = find_parameters(notebook)
    folder = (folder or notebook.parent).absolute()
    if not recipe and parameters["recipe"]:
        recipe = " + ".join(map(str, find_recipes(parameters["recipe"], folder)))
    settings = find_here(settings)
    own = load_config(recipe, parameters["settings"], origin="notebook")
    config = own.change(settings, "--set")
    name = name or parameters["run_name"]
    name = check_name(name) if name else None
    together = read_settings(parameters["settings"]) | settings
    supervisor = Supervisor(grace, timeout)
    supervisor.follow_parent()
    with supervisor.catch_signals():
        session = begin(config, name, notebook.name, supervisor, folder)
        run = session.run
        assert run is not None
        try:
            hand_over(session, {"recipe": config.recipes, "settings": together})
            print(f"Run {run.path.name}: {notebook.name}, recipe {config.recipes or 'none'}\n        {run.path}", flush=True)
            print("Starting the kernel; the libraries take some seconds to import.", flush=True)
            execute(notebook, run.path / "notebook.ipynb", session)
        finally:
            if not session.finished:  # an error of the executor itself: the run must not look alive
                session.finish(session.outcome)
        if (run.path / "notebook.ipynb").exists():
            try:
                write_html(run.path / "notebook.ipynb", run.path / "notebook.html")
            except OSError as error:  # how the run ended is recorded by then
                print(f"notebook.html cannot be written: {error.strerror}.", flush=True)
    return run


def execute(notebook: Path, output: Path, session: Session) -> Outcome:
    """Execute with papermill and forgekit's engine; return how it ended, which the session has recorded by then."""
    import papermill
    from papermill.engines import papermill_engines

    from .engine import ForgekitEngine

    papermill_engines.register("forgekit", ForgekitEngine)  # works without an installed entry point, too
    with contextlib.suppress(papermill.PapermillExecutionError, SystemExit):  # the outcome says it better
        papermill.execute_notebook(
            keep_braces(notebook),
            keep_braces(output),
            engine_name="forgekit",
            session=session,
            kernel_name="python3",
            language="python",  # a notebook that was never opened does not say
            progress_bar=False,
            log_output=False,
            stdout_file=Echo(sys.stdout),
            stderr_file=Echo(sys.stderr),
            start_timeout=300,
            cwd=str(session.folder or notebook.parent.absolute()),
        )
    return session.outcome


def keep_braces(path: Path) -> str:
    """Return a path as papermill takes it literally: it fills `{names}` in."""
    return str(path).replace("{", "{{").replace("}", "}}")


class Echo:
    """A stream for what the cells print, which outlives its terminal: after a hang-up nobody reads, and the run goes on."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        """Write, or send this and all that follows nowhere."""
        try:
            self.stream.write(remove_tokens(text))  # a cluster keeps what a job prints
            self.stream.flush()
        except (OSError, ValueError):
            silence(self.stream)

    def flush(self) -> None:
        """Nothing waits: each write was flushed."""


def silence(stream: TextIO) -> None:
    """Point a stream's file at nothing, so that what it holds back does not fail again when the process ends."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def write_html(notebook: Path, html: Path) -> None:
    """Write the executed notebook as one HTML file that needs no network to be read."""
    from nbconvert import HTMLExporter

    body, _ = HTMLExporter(embed_images=True).from_filename(str(notebook))
    write_text(html, body)
