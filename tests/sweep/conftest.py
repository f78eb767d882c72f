"""Sweeps whose runs are a small program that ends as it is told to: queue, retries and signals in seconds."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

from forgekit.sweep.local import Local
from forgekit.sweep.run import run_sweep

FAKE = (sys.executable, "-S", str(Path(__file__).with_name("fake_run.py")))
PARAMETERS = 'recipe: str = "recipe.yaml"\nsettings: dict = {}\nrun_name: str = ""'
# three points, the second the best
RATES = {"name": "rates", "notebook": "toy.ipynb", "grid": {"train.learning_rate": [0.0005, 0.001, 0.002]}}
NAMES = ["rates-learning_rate-0.0005", "rates-learning_rate-0.001", "rates-learning_rate-0.002"]


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test stands in a folder with a notebook and a recipe; runs go below it; there is no GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORGEKIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("FORGEKIT_RUN", "FORGEKIT_SUPERVISED", "FORGEKIT_PARAMETERS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    )
    nbformat.write(notebook, "toy.ipynb")
    Path("recipe.yaml").write_text("evaluate: {metric: json_equal}\n")
    return tmp_path


def write_sweep(values: dict[str, Any], **changes: Any) -> Path:
    Path("sweep.yaml").write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return Path("sweep.yaml")


def read_record(name: str = "rates") -> dict[str, Any]:
    return json.loads((Path("runs/sweeps") / name / "sweep.json").read_text())


def read_states(name: str = "rates") -> dict[str, str]:
    """Run -> state, as sweep.json tells it; the sweep's name is left out of the run's."""
    return {run["name"].removeprefix(f"{name}-"): run["state"] for run in read_record(name)["runs"]}


def read_started() -> list[str]:
    """The runs in the order in which they were started."""
    return [line.split()[0] for line in Path("started.txt").read_text().splitlines()]


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Returns a function: changes of the file, what the runs do, options -> exit code of the sweep in this process."""

    class Fake(Local):
        def __init__(self, slots: int | None, gpus: int | None):
            super().__init__(slots, gpus, FAKE)

    monkeypatch.setattr("forgekit.sweep.local.Local", Fake)
    monkeypatch.setattr("forgekit.sweep.control.TICK_SECONDS", 0.02)
    # seconds in all, and test_results.py and test_end_to_end.py look at what it writes
    monkeypatch.setattr("forgekit.sweep.control.write_results", lambda folder: None)

    def run(behaviour: dict[str, list[str]] | None = None, values: dict[str, Any] = RATES, **options: Any) -> int:
        Path("behaviour.json").write_text(json.dumps(behaviour or {}))
        return run_sweep(write_sweep(values), **options)

    return run
