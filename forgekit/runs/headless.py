"""A notebook from start to end without a browser: papermill executes it, the run's folder keeps what it printed."""

import ast
import asyncio
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from ..config import PARAMETERS, load_config, read_settings
from ..environment import set_environment
from ..errors import ConfigError, RunError
from ..evaluate.gates import STOPPED, check_gates
from ..paths import check_inside
from ..recipe import find_recipes
from ..run_folder import DONE, Run, check_name, check_unused, find_run_root, now, read_json, write_text
from ..scrub import CleanFile, remove_tokens
from ..tokens import refuse_tokens


def run_notebook(notebook: Path, recipe: str | None, settings: Mapping[str, Any], name: str | None = None) -> Run:
    """Execute a notebook in its own kernel and keep it, as notebook and as HTML, in the run's folder.

    Args:
        notebook: one with a cell tagged `parameters`.
        recipe: the recipe to use instead of the notebook's own.
        settings: dotted names on top of the recipe.
        name: the run's name; None takes the time.

    Returns the run, state "completed" or "failed"; "gates_failed" when a gate of evaluate.gates did not pass and
    evaluate.gates_action is stop. What the cells print appears as it comes.

    Raises:
        ConfigError, RunError: before the kernel starts, when a setting, the notebook or the name is wrong.
    """
    set_environment()
    parameters = find_parameters(notebook)
    if not recipe and parameters["recipe"]:
        recipe = " + ".join(map(str, find_recipes(parameters["recipe"], notebook.parent)))
    settings = find_here(settings)
    own = load_config(recipe, parameters["settings"], origin="notebook")
    config = own.change(settings, "--set")
    name = check_name(name or parameters["run_name"] or datetime.now().strftime("%Y%m%d-%H%M%S"))
    path = check_inside(find_run_root(config.recipe), name)
    check_unused(path)
    together = read_settings(parameters["settings"]) | settings  # papermill replaces the notebook's own
    given = {"recipe": config.recipes, "settings": together, "run_name": name}
    run = Run(path, {"name": name, "state": "running", "pid": os.getpid(), "started_at": now()})
    try:
        path.mkdir(parents=True, exist_ok=True)
        run.update(notebook=notebook.name)
    except OSError as error:
        raise RunError(
            f"the run's folder {path} cannot be written: {error.strerror}. Set FORGEKIT_RUNS to a folder that can."
        ) from None
    print(f"Run {name}: {notebook.name}, recipe {config.recipes or 'none'}\n        {path}", flush=True)
    print("Starting the kernel; the libraries take some seconds to import.", flush=True)
    state: str = "failed"
    failure: str | None = "the notebook could not be executed"
    try:
        with environment(FORGEKIT_RUN=name, FORGEKIT_RUNS=str(path.parent)):
            state, failure = execute(notebook, path / "notebook.ipynb", given)
    finally:
        # the kernel has added settings, scores and exports to run.json in the meantime
        run.record = read_json(path / "run.json")
        if state == DONE:
            state, failure = judge_run(run)
        run.finish(state, failure)
    if (path / "notebook.ipynb").exists():
        write_html(path / "notebook.ipynb", path / "notebook.html")
    return run


def judge_run(run: Run) -> tuple[str, str | None]:
    """Judge the gates of a run that came to its end; return its state, and which gates failed if that stops it."""
    gates = check_gates(run)
    action = run.record.get("settings", {}).get("evaluate.gates_action", {}).get("value")
    if gates.held or action != "stop":
        return DONE, None
    return STOPPED, f"gates that did not pass: {', '.join(gates.failed)}"


# settings that may name a file or folder
PATHS = ("data.path", "data.train", "data.validation", "data.test", "model.id", "adapter.path", "train.status_file")


def find_here(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with files and folders of the current folder made absolute: the kernel runs in the notebook's."""
    found = read_settings(settings)
    for name in PATHS:
        value = found.get(name)
        if isinstance(value, str) and value and Path(value).expanduser().exists():
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
        cell = next((cell for cell in cells if "parameters" in cell.metadata.get("tags", [])), None)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise ConfigError(f"{notebook} is no notebook: {str(error).splitlines()[0][:120]}") from None
    except (AttributeError, TypeError):  # JSON, but of something else
        raise ConfigError(f"{notebook} is no notebook: its JSON does not hold a notebook's cells.") from None
    if cell is None:
        raise ConfigError(f"{notebook} has no cell with the tag `parameters`, so a recipe could not reach it.")
    found = {}
    for name, value in find_assignments(cell.source, notebook):
        try:
            found[name] = ast.literal_eval(value)
        except ValueError:
            raise ConfigError(
                f"{notebook}: the parameter {name} is {ast.unparse(value)}; only plain values can be read, such as text and numbers."
            ) from None
    refuse_tokens(found, f"the parameters cell of {notebook.name}")
    missing = [name for name in PARAMETERS if name not in found]
    if missing:
        raise ConfigError(f"{notebook}: the parameters cell lacks {', '.join(missing)}.")
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


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables, which a kernel inherits, and put them back."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def execute(notebook: Path, output: Path, parameters: dict[str, Any]) -> tuple[str, str | None]:
    """Execute with papermill; return the state and, when it failed, the cell and the error in one line."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    try:
        papermill.execute_notebook(
            str(notebook),
            str(output),
            parameters=parameters,
            kernel_name="python3",
            language="python",  # a notebook that was never opened does not say
            progress_bar=False,
            log_output=False,
            stdout_file=CleanFile(sys.stdout, remove_tokens),  # a cluster keeps what a job prints
            stderr_file=CleanFile(sys.stderr, remove_tokens),
            cwd=str(notebook.parent.absolute()),
            config=encrypt_connection(),
            kernel_manager_class=patient_manager(),
        )
    except papermill.PapermillExecutionError as error:
        return "failed", " ".join(f"cell {error.exec_count}: {error.ename}: {error.evalue}".split())
    except DeadKernelError as error:
        return "failed", f"the kernel died: {error} (out of memory is the usual cause; see logs/training.log)"
    except KeyboardInterrupt:
        return "stopped", "interrupted from the keyboard"
    return DONE, None


def encrypt_connection() -> Any:
    """Return traitlets' Config that lets the kernel encrypt its connection; without it the kernel warns that it does not.

    An older jupyter_client knows neither the setting nor the warning.
    """
    from jupyter_client import KernelManager
    from traitlets.config import Config as Traits

    known = "transport_encryption" in KernelManager.class_trait_names()
    return Traits({"KernelManager": {"transport_encryption": "auto"}} if known else {})


def patient_manager() -> type:
    """Return a kernel manager that lets the kernel finish its last answer before it is interrupted and shut down.

    The interrupt comes right behind that answer; a kernel that is still busy with it reports an error, after a run that
    went well. Half a second is enough on a busy machine; between two answers a kernel ignores interrupts.
    """
    from jupyter_client.manager import AsyncKernelManager

    class PatientManager(AsyncKernelManager):
        async def _async_interrupt_kernel(self) -> None:
            if self.shutting_down:
                await asyncio.sleep(0.5)
            await super()._async_interrupt_kernel()

    return PatientManager


def write_html(notebook: Path, html: Path) -> None:
    """Write the executed notebook as one HTML file that needs no network to be read."""
    from nbconvert import HTMLExporter

    body, _ = HTMLExporter(embed_images=True).from_filename(str(notebook))
    write_text(html, body)
