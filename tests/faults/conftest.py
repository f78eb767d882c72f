"""A warm process that forks trainings and breaks them, and what is compared afterwards."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from .breaking import PLACES, STEPS, hash_export

WARM = Path(__file__).with_name("warm.py")


class Warm:
    """Runs trainings of the folder, one after another; see warm.py for what a job may hold."""

    def __init__(self, folder: Path, project: Path, before: tuple[str, ...] = ()):
        """Start it; `before` is a command that it is started by, for a file system of its own."""
        self.folder, self.expected, self.used = folder, {}, 0
        self.stopped_by: str | None = None  # who stopped the last job, when a supervisor watched it
        self.run = ""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1"}
        environment.pop("FORGEKIT_FAULT", None)
        self.process = subprocess.Popen(
            [*before, sys.executable, str(WARM), str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(folder / "warm.log", "w"),  # noqa: SIM115
            text=True, env=environment, cwd=project,
        )  # fmt: skip
        assert self.answer() == "ready", (folder / "warm.log").read_text()[-3000:]

    def answer(self) -> Any:
        line = self.process.stdout.readline()
        return json.loads(line) if line else "the warm process ended"

    def train(self, run: str, **job: Any) -> int:
        """Run one job; return its exit code, or minus the signal that ended it."""
        self.run = run
        self.process.stdin.write(json.dumps({"folder": str(self.folder), "run": run, **job}) + "\n")
        self.process.stdin.flush()
        status, self.stopped_by = self.answer()
        return status

    def new_run(self) -> str:
        self.used += 1
        return f"run-{self.used}"

    def path(self, run: str) -> Path:
        return self.folder / "runs" / run

    def read_record(self, run: str) -> dict[str, Any]:
        return json.loads((self.path(run) / "run.json").read_text(encoding="utf-8"))

    def read_losses(self, run: str) -> list[tuple[int, float]]:
        """Return step and loss of each line of metrics.jsonl, steps that were done twice included."""
        lines = self.read_lines(run, "metrics.jsonl")
        return [(row["step"], row["loss"]) for row in map(json.loads, lines) if "loss" in row]

    def read_hashes(self, run: str, step: int = STEPS) -> dict[str, str]:
        """Return the hash of each file of a checkpoint that holds numbers, weights, moments and schedule."""
        manifest = json.loads((self.path(run) / "checkpoints" / f"checkpoint-{step}" / "manifest.json").read_text())
        numbers = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
        return {file["name"]: file["sha256"] for file in manifest["files"] if file["name"] in numbers}

    def uninterrupted(self, settings: dict[str, Any]) -> tuple[dict[int, float], dict[str, str]]:
        """Return the losses and hashes of a training with these settings that nothing disturbs; each is run once."""
        key = json.dumps(settings, sort_keys=True)
        if key not in self.expected:
            run = self.new_run()
            assert self.train(run, settings=settings) == 0, self.log(run)
            self.expected[key] = dict(self.read_losses(run)), self.read_hashes(run)
        return self.expected[key]

    def exported(self, settings: dict[str, Any]) -> dict[str, str]:
        """Return the hashes of an export that nothing disturbs."""
        key = f"export {json.dumps(settings, sort_keys=True)}"
        if key not in self.expected:
            run = self.new_run()
            assert self.train(run, settings=settings, export=True) == 0, self.log(run)
            self.expected[key] = {
                name: hash_export(self.path(run) / "models" / place) for name, place in PLACES.items()
            }
        return self.expected[key]

    def log(self, run: str) -> str:
        return (self.folder / f"{run}.log").read_text(encoding="utf-8")[-3000:]

    def last_log(self) -> str:
        return self.log(self.run)

    def starts(self, run: str) -> list[int]:
        """Return the steps that the run's trainings started at."""
        lines = self.read_lines(run, "training.log")
        return [int(line.split()[5]) for line in lines if "training starts at step" in line]

    def read_lines(self, run: str, name: str) -> list[str]:
        """Return the lines of a log, none when the training was killed before it began one."""
        path = self.path(run) / "logs" / name
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def remove(self, run: str) -> None:
        shutil.rmtree(self.path(run))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


PARAMETERS = 'recipe: str = ""\nsettings: dict = {}\nrun_name: str = ""'
START = "import forgekit as fk\n\nconfig = fk.load_config(recipe, settings)\nrun = fk.start_run(config, run_name)"


@pytest.fixture
def write_notebook() -> Callable[..., Path]:
    """Returns a function: path, sources of cells -> a notebook that starts a run and executes them."""

    def write(path: Path, *sources: str) -> Path:
        cells = [nbformat.v4.new_code_cell(source.strip()) for source in (PARAMETERS, START, *sources)]
        cells[0].metadata["tags"] = ["parameters"]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
        return path

    return write


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory, project_folder: Path) -> Iterator[Warm]:
    process = Warm(tmp_path_factory.mktemp("warm"), project_folder)
    yield process
    process.close()
