"""Notebooks of a few cells without torch, executed in this process: the kernel's parent is pytest, so a cell can signal it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest

from forgekit.files import read_json
from forgekit.runs.headless import run_notebook

PARAMETERS = 'recipe: str = ""\nsettings: dict = {}\nrun_name: str = ""'
START = "import forgekit as fk\n\nconfig = fk.load_config(recipe, settings)\nrun = fk.start_run(config, run_name)"
LOAD = """
processor = fk.load_processor(config)
data = fk.load_data(config, processor)
model, processor = fk.load_model(config)
model = fk.add_adapter(model, config)
trainer = fk.sft_trainer(model, processor, data, config, run)
"""
CHILD = "child = subprocess.Popen(['sleep', '600'])\npathlib.Path('child').write_text(str(child.pid))\n"
# what a cell can do to be hard to end; `saved` says that it had time to clean up
WAIT = """
import os, pathlib, signal, subprocess, sys, time
pathlib.Path("kernel").write_text(str(os.getpid()))
{first}
try:
    time.sleep(60)
finally:
    pathlib.Path("saved").write_text("yes")
"""


def is_gone(file: str) -> bool:
    """Say whether the process whose number stands in a file has ended."""
    try:
        return psutil.Process(int(Path(file).read_text())).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def write_notebook(*sources: str, name: str = "toy.ipynb", tags: dict[int, list[str]] | None = None) -> Path:
    """Write a notebook of code cells, the first one tagged `parameters`; `tags` by position."""
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in sources], metadata=kernel
    )
    for number, cell in enumerate(notebook.cells):
        cell.metadata["tags"] = (tags or {}).get(number, ["parameters"] if number == 0 else [])
    nbformat.write(notebook, name)
    return Path(name)


@dataclass(frozen=True)
class Ended:
    """An execution that has ended."""

    folder: Path
    seconds: float

    @property
    def record(self) -> dict[str, Any]:
        return read_json(self.folder / "run.json")

    @property
    def status(self) -> dict[str, Any]:
        return read_json(self.folder / "status.json")

    def read(self, name: str) -> Any:
        return nbformat.read(self.folder / name, as_version=4)

    @property
    def cells(self) -> list[Any]:
        return nbformat.read(self.folder / "notebook.ipynb", as_version=4).cells

    @property
    def metadata(self) -> Any:
        return nbformat.read(self.folder / "notebook.ipynb", as_version=4).metadata

    def statuses(self) -> list[str]:
        """What papermill's metadata says of each code cell, without the two that every notebook begins with."""
        return [cell.metadata["papermill"]["status"] for cell in self.cells if cell.cell_type == "code"][2:]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test stands in a folder of its own; runs go below it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORGEKIT_RUNS", str(tmp_path / "runs"))
    for name in ("FORGEKIT_RUN", "FORGEKIT_SUPERVISED", "FORGEKIT_PARAMETERS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def execute(own_folder: Path) -> Callable[..., Ended]:
    """Returns a function: sources of cells behind the parameters -> the execution, as `forgekit run` does it."""

    def run(*sources: str, tags: dict[int, list[str]] | None = None, **options: Any) -> Ended:
        notebook = write_notebook(PARAMETERS, *sources, tags=tags)
        began = time.monotonic()
        folder = run_notebook(notebook, None, options.pop("settings", {}), options.pop("name", "toy"), **options).path
        return Ended(folder, time.monotonic() - began)

    return run


@pytest.fixture
def settings(tiny_folder: Path, orders_file: Path) -> dict:
    """A run of 400 steps of the random checkpoint, which a test ends in the third."""
    return {
        "data.path": str(orders_file),
        "model.id": str(tiny_folder),
        "model.engine": "huggingface",
        "model.device": "cpu",
        "model.load_in": "16bit",
        "model.max_length": 256,
        "train.max_steps": 400,
        "train.status_file": "elsewhere/status.json",
    }
