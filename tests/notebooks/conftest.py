"""One execution of the text notebook, as `make demo` does it, serves every test that only looks at what came out."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest


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


def run_text_notebook(project_folder: Path, runs: Path, name: str, *arguments: str) -> Finished:
    """Run the quick text notebook by the command, from the project's folder."""
    command = [sys.executable, "-m", "forgekit", "run", "notebooks/01_text.ipynb", "--recipe", "params/text_quick.yaml"]
    done = subprocess.run(
        [*command, "--name", name, *arguments],
        cwd=project_folder,
        env=os.environ | {"FORGEKIT_RUNS": str(runs)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return Finished(done, runs / name)


@pytest.fixture(scope="session")
def text_run(project_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The recipe as it is, with its own seed. About a minute on two idle cores."""
    finished = run_text_notebook(project_folder, tmp_path_factory.mktemp("runs of the day"), "text")
    assert finished.done.returncode == 0, finished.done.stdout[-3000:] + finished.done.stderr[-3000:]
    return finished
