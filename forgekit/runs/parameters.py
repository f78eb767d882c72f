"""Parameters of a notebook: read from its cell as literals, and handed to the kernel as one JSON file, never as code."""

import ast
import json
import os
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from ..config import PARAMETERS, is_empty, read_settings
from ..conflicts import suggest
from ..errors import ConfigError
from ..files import write_json
from ..tokens import refuse_tokens

VARIABLE = "FORGEKIT_PARAMETERS"
TAG = "injected-parameters"
# always these words: what changes from run to run stands in the file
SOURCE = """# This run's parameters, from parameters.json in its folder
from forgekit.runs.parameters import take_parameters

take_parameters(globals())"""


# settings that may name a file or folder
PATHS = ("data.path", "data.train", "data.validation", "data.test", "model.id", "adapter.path", "train.status_file", "train.resume")
OUTPUTS = ("train.status_file",)  # need not exist yet


def find_here(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with files and folders of the current folder made absolute: the kernel runs in the notebook's."""
    found = read_settings(settings)
    for name in PATHS:
        value = found.get(name)
        if not isinstance(value, str) or not value or is_empty(name, value):
            continue
        if name in OUTPUTS or Path(value).expanduser().exists():
            found[name] = str(Path(value).expanduser().absolute())
    general = found.get("evaluate.regression")
    if isinstance(general, dict) and Path(str(general.get("path", ""))).expanduser().is_file():
        found["evaluate.regression"] = general | {"path": str(Path(general["path"]).expanduser().absolute())}
    return found


def find_parameters(notebook: Path) -> dict[str, Any]:
    """Return the notebook's own parameters. Raises ConfigError when it is missing, no notebook, or has none."""
    import nbformat

    if not notebook.is_file():
        raise ConfigError(f"notebook {notebook} does not exist. `forgekit init DIR` copies the shipped ones.")
    try:
        cells = nbformat.read(notebook, as_version=4).cells
        cell = find_cell(cells)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise ConfigError(f"{notebook} is no notebook: {str(error).splitlines()[0][:120]}") from None
    except (AttributeError, TypeError):  # JSON, but of something else
        raise ConfigError(f"{notebook} is no notebook: its JSON does not hold a notebook's cells.") from None
    if cell is None:
        raise ConfigError(f"{notebook} has no cell with the tag `parameters`, so a recipe could not reach it.")
    found = read_literals(cell.source, notebook)
    refuse_tokens(found, f"the parameters cell of {notebook.name}")
    missing = [name for name in PARAMETERS if name not in found]
    if missing:
        raise ConfigError(f"{notebook}: the parameters cell lacks {', '.join(missing)}.")
    return found


def find_cell(cells: list[Any]) -> Any:
    """Return the cell with the tag `parameters`, or None."""
    return next((cell for cell in cells if "parameters" in cell.metadata.get("tags", [])), None)


def read_literals(source: str, notebook: Path) -> dict[str, Any]:
    """Return the values of a parameters cell by name. Raises ConfigError for one that is no plain value."""
    found = {}
    for name, value in find_assignments(source, notebook):
        try:
            found[name] = ast.literal_eval(value)
        except ValueError:
            raise ConfigError(
                f"{notebook}: the parameter {name} is {ast.unparse(value)}; only plain values can be read, such as text and numbers."
            ) from None
    return found


def find_assignments(source: str, notebook: Path) -> Iterator[tuple[str, ast.expr]]:
    """Yield each `name = value` and `name: type = value` of a cell. Raises ConfigError when it is no plain Python."""
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise ConfigError(
            f"{notebook}: line {error.lineno} of the parameters cell is no plain Python: {error.msg}."
        ) from None
    for node in body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                yield target.id, node.value


def write_parameters(file: Path, given: Mapping[str, Any]) -> None:
    """Write a run's parameters."""
    write_json(file, dict(given))


def take_parameters(names: MutableMapping[str, Any]) -> None:
    """Set the parameters of this run in a notebook's names, and print them; runs in the kernel.

    Raises ConfigError when the file holds a name that the notebook does not have.
    """
    file = os.environ.get(VARIABLE)
    if not file:
        return
    try:
        given = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the run's parameters {file} cannot be read: {error}") from None
    check_known(given, PARAMETERS)
    names.update(given)
    for name, value in given.items():
        print(f"{name} = {value!r}")


def check_known(given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise ConfigError naming every parameter that the notebook does not have."""
    known = list(known)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ConfigError([f"{name}: the notebook has no such parameter.{suggest(name, known)}" for name in unknown])


def insert_parameters(notebook: Any) -> None:
    """Put the cell that takes the parameters behind the notebook's own, in the place where papermill would paste code."""
    from nbformat.v4 import new_code_cell

    cells = [cell for cell in notebook.cells if TAG not in cell.metadata.get("tags", [])]
    position = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])) + 1
    cells.insert(position, new_code_cell(SOURCE, metadata={"tags": [TAG], "papermill": {}}))
    notebook.cells = cells
