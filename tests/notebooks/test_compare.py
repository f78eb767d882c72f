"""The notebook that compares runs, executed by papermill on folders of runs that were written by hand."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent.parent / "notebooks" / "04_compare_runs.ipynb"


def write_run(folder: Path, rate: float, score: float) -> None:
    """A completed run with two steps in its log."""
    settings = {"train.learning_rate": rate, "evaluate.metric": ["json_equal"]}
    files: dict[str, Any] = {
        "run.json": {"state": "completed", "settings": {name: {"value": value} for name, value in settings.items()}},
        "metrics/scores.json": {"metrics": {"json_equal": {"score": score, "low": score - 0.1, "high": score + 0.1}}},
        "metrics/training-stats.json": {"best_held_out_loss": 2.0 - score, "steps": 2, "seconds": 3.0},
    }
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    (folder / "logs").mkdir()
    lines = [{"step": step, key: 3.0 - step} for step in (1, 2) for key in ("loss", "eval_loss")]
    (folder / "logs/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def execute(folder: Path, *parameters: str) -> nbformat.NotebookNode:
    """Execute the notebook from a folder; it has to come to its end without a word on the way."""
    variables = {name: value for name, value in os.environ.items() if name != "FORGEKIT_RUNS"}
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(NOTEBOOK),
        "out.ipynb",
        "--no-progress-bar",
        "--log-level",
        "ERROR",
    ]
    done = subprocess.run([*command, *parameters], cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return nbformat.read(folder / "out.ipynb", as_version=4)


def read_outputs(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """Last line of each code cell -> what it shows as text or HTML; a picture counts as its text."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.outputs]
    texts = [[o.data.get("text/html", o.data.get("text/plain")) for o in cell.outputs if "data" in o] for cell in cells]
    return {cell.source.splitlines()[-1]: "".join(found) for cell, found in zip(cells, texts, strict=True)}


def test_runs_that_no_sweep_made_are_put_side_by_side(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "slow", 0.001, 0.25)
    write_run(tmp_path / "runs" / "fast", 0.004, 0.75)
    notebook = execute(tmp_path)
    shown = read_outputs(notebook)
    assert "2 runs in runs, 2 with a score; best by json_equal (more is better): fast." in shown["results"]
    assert re.findall(r"65.0 to 85.0|15.0 to 35.0", shown["results"]) == ["65.0 to 85.0", "15.0 to 35.0"]
    assert "train.learning_rate" in shown["results.differences"] and "0.004" in shown["results.differences"]
    assert (
        shown["results.show_figure()"].startswith("'Losses by step")
        or "Losses by step" in shown["results.show_figure()"]
    )
    pictures = [o.data for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 1


@pytest.mark.slow
def test_with_nothing_to_compare_it_says_so(tmp_path: Path) -> None:
    shown = read_outputs(execute(tmp_path))
    assert "There is nothing to compare: no runs in runs." in shown["results"]
    assert "There is nothing to compare" in shown["results.show_figure()"]


@pytest.mark.slow
def test_a_sweep_is_read_by_its_name(tmp_path: Path) -> None:
    for name, rate in (("s-1", 0.001), ("s-2", 0.002)):
        write_run(tmp_path / "runs" / name, rate, 100 * rate)
    runs = [{"name": f"s-{i}", "settings": {"train.learning_rate": i / 1000}, "state": "completed", "attempts": 1, "reason": None} for i in (1, 2)]  # fmt: skip
    record = {
        "name": "s",
        "score": "json_equal",
        "direction": "maximize",
        "settings": ["train.learning_rate"],
        "runs": runs,
    }
    (tmp_path / "runs" / "sweeps" / "s").mkdir(parents=True)
    (tmp_path / "runs" / "sweeps" / "s" / "sweep.json").write_text(json.dumps(record))
    assert "2 runs in runs/sweeps/s" in read_outputs(execute(tmp_path, "-p", "sweep", "s"))["results"]
