"""One execution of each notebook with its quick recipe serves every test that only looks at what came out.

`make outputs` executes a notebook and stores its outputs anew; `FORGEKIT_RUNS=$(mktemp -d) pytest --nbval
notebooks/01_text.ipynb` executes it and compares. The folder is a fresh one because a base that was scored in a run beside
is not scored again, and says so. Here the outputs of the one execution are compared by nbval's own functions.
"""

import copy
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbval.plugin import IPyNbCell, IPyNbFile, coalesce_streams

NOTEBOOKS = {"text": "01_text", "vision": "02_vision", "audio": "03_audio"}
# what the quick recipes export, and where it stands in the run's folder
EXPORTS = {"adapter": "models/lora", "merged": "models/merged", "gguf:q8_0": "models/quantized/model-Q8_0.gguf"}


@dataclass(frozen=True)
class Finished:
    """A run of the command that has ended: what it printed, and the run's folder."""

    done: subprocess.CompletedProcess
    folder: Path

    @property
    def notebook(self) -> nbformat.NotebookNode:
        """The executed notebook without the cell that papermill put in."""
        notebook = nbformat.read(self.folder / "notebook.ipynb", as_version=4)
        notebook.cells = [c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])]
        return notebook

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


def run_notebook(kind: str, project_folder: Path, runs: Path, *arguments: str) -> Finished:
    """Run a notebook with its quick recipe by the command, from the project's folder; it has to come to its end."""
    command = [sys.executable, "-m", "forgekit", "run", f"notebooks/{NOTEBOOKS[kind]}.ipynb"]
    done = subprocess.run(
        [*command, "--recipe", f"params/{kind}_quick.yaml", "--name", kind, *arguments],
        cwd=project_folder,
        env=os.environ | {"FORGEKIT_RUNS": str(runs)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Finished(done, runs / kind)


# each with its recipe as it is, with its own seed


@pytest.fixture(scope="session")
def text_run(project_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return run_notebook("text", project_folder, tmp_path_factory.mktemp("runs of the day"))


@pytest.fixture(scope="session")
def vision_run(project_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return run_notebook("vision", project_folder, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def audio_run(project_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return run_notebook("audio", project_folder, tmp_path_factory.mktemp("runs"))


def find_output(finished: Finished, call: str, kind: str = "text/html") -> str:
    """Return what the cell with a call showed."""
    (cell,) = [cell for cell in finished.notebook.cells if cell.cell_type == "code" and call in cell.source]
    (shown,) = [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]
    return shown


def collect_cells(notebook: Path, session: pytest.Session) -> list[IPyNbCell]:
    """Return nbval's test items of a notebook, one a code cell, with its stored outputs and what its tags ask for."""
    return list(IPyNbFile.from_parent(session, path=notebook).collect())


def find_differences(notebook: Path, executed: nbformat.NotebookNode, session: pytest.Session) -> dict[str, str]:
    """Compare stored with executed outputs as nbval does after it has executed a cell; return cell id -> difference."""
    outputs = {cell.id: cell.outputs for cell in executed.cells if cell.cell_type == "code"}
    items = collect_cells(notebook, session)
    assert [item.cell.id for item in items] == list(outputs)
    differences = {}
    for item in items:
        stored, seen = (coalesce_streams(copy.deepcopy(o)) for o in (item.cell.outputs, outputs[item.cell.id]))
        if item.options["check"] and not item.compare_outputs(seen, stored):
            differences[item.cell.id] = "\n".join(item.comparison_traceback)
    return differences
