"""The session of a notebook that plain papermill executes with forgekit's engine: checked and recorded as `forgekit run` does."""

from pathlib import Path
from typing import Any

from ..config import PARAMETERS, load_config
from ..environment import set_environment
from .parameters import check_known, find_cell, read_literals
from .session import Session, begin
from .supervise import Supervisor


def begin_from_notebook(notebook: Any, source: str | None) -> Session:
    """Return a session for a notebook into which papermill has pasted its parameters.

    A notebook without forgekit's parameters is supervised too, without a run's folder.

    Raises:
        ConfigError: a parameter or setting is unknown or wrong.
        RunError: the run's name is taken, or its folder cannot be written.
    """
    set_environment()
    name = Path(source or "notebook.ipynb")
    cell = find_cell(notebook.cells)
    own = {} if cell is None else read_literals(cell.source, name)
    given = notebook.metadata.get("papermill", {}).get("parameters", {})
    if cell is not None:
        check_known(given, own)
    if not own.keys() >= set(PARAMETERS):
        return Session()
    values = {**own, **given}
    config = load_config(values["recipe"] or None, values["settings"])
    return begin(config, values["run_name"], name.name, Supervisor(), Path.cwd())
