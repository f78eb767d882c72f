"""The vision and audio notebooks: to the end in a few steps by default, to their scores with `--slow`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# notebook, recipe, tower whose modules learn, points of exact match that the whole recipe gains at least
CASES = {"vision": ("02_vision", 200, 60), "audio": ("03_audio", 100, 50)}
FEW = ["train.max_steps=4", "train.eval_steps=2", "evaluate.rows=10"]


def run_notebook(project_folder: Path, runs: Path, kind: str, *settings: str) -> Path:
    """Run the quick notebook of a kind by the command; return the run's folder."""
    name = CASES[kind][0]
    command = [
        sys.executable,
        "-m",
        "forgekit",
        "run",
        f"notebooks/{name}.ipynb",
        "--recipe",
        f"params/{kind}_quick.yaml",
    ]
    done = subprocess.run(
        [*command, "--name", kind, *(["--set", *settings] if settings else [])],
        cwd=project_folder,
        env=os.environ | {"FORGEKIT_RUNS": str(runs)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return runs / kind


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", CASES)
def test_a_few_steps_reach_the_last_cell_and_train_the_tower(kind: str, project_folder: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    folder = run_notebook(project_folder, tmp_path, kind, *FEW)
    assert read(folder, "run.json")["state"] == "completed"
    scores = read(folder, "metrics/scores.json")
    assert len(scores["rows"]) == 10
    assert scores["loss"] < read(folder, "metrics/baseline.json")["loss"]
    with safe_open(folder / "models/lora/adapter_model.safetensors", "pt") as adapter:
        learned = {name: adapter.get_tensor(name).abs().max() > 0 for name in adapter.keys() if "lora_B" in name}  # noqa: SIM118
    for tower in (f"{kind}_tower", f"embed_{kind}", "language_model"):
        assert any(tower in name for name in learned), tower
    assert sum(learned.values()) > 0.9 * len(learned)
    page = (folder / "notebook.html").read_text(encoding="utf-8")
    assert ("<audio" if kind == "audio" else "data:image/png") in page


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("kind", CASES)
def test_the_whole_recipe_moves_the_score_far(kind: str, seed: int, project_folder: Path, tmp_path: Path) -> None:
    folder = run_notebook(project_folder, tmp_path, kind, f"train.seed={seed}")
    before, after = read(folder, "metrics/baseline.json"), read(folder, "metrics/scores.json")
    assert len(after["rows"]) == CASES[kind][1]
    assert 100 * (after["exact_match"] - before["exact_match"]) >= CASES[kind][2]
