"""The text notebook under papermill's own command, and from an installed wheel outside the tree."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
import yaml

SHORT = {
    "data.train": 32,
    "train.max_steps": 2,
    "train.eval_steps": 2,
    "evaluate.rows": 4,
    "evaluate.max_new_tokens": 8,
    "export.formats": ["adapter"],
}


def run_python(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder with some environment variables."""
    environment = os.environ | variables
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_papermill_takes_settings_as_text_and_parameters_from_a_file(project_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"run_name": "from-file", "settings": {"train.seed": 9}}))
    command = ["-m", "papermill", "notebooks/01_text.ipynb", str(tmp_path / "out.ipynb"), "--no-progress-bar"]
    given = ["-f", str(tmp_path / "params.yaml"), "-p", "settings", json.dumps(SHORT)]
    done = run_python(project_folder, *command, *given, FORGEKIT_RUNS=str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "runs" / "from-file" / "run.json").read_text())
    assert record["state"] == "completed" and record["training"]["steps"] == 2
    assert record["settings"]["train.max_steps"] == {"value": 2, "from": "notebook"}
    assert record["settings"]["train.seed"]["value"] == 3407  # -p takes the place of the file's value as a whole


def test_papermill_with_a_parameter_that_no_cell_reads_is_refused(project_folder: Path, tmp_path: Path) -> None:
    command = ["-m", "papermill", "notebooks/01_text.ipynb", str(tmp_path / "out.ipynb"), "--no-progress-bar"]
    done = run_python(project_folder, *command, "-p", "recpie", "x", FORGEKIT_RUNS=str(tmp_path / "runs"))
    assert done.returncode != 0
    assert "recpie: the notebook has no such parameter. Did you mean recipe?" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def site(project_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel: what an installation of pure Python code comes down to."""
    folder = tmp_path_factory.mktemp("site packages")
    build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(project_folder)]
    done = run_python(folder, *build)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(folder.glob("forgekit-*.whl"))) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_runs_its_notebook_outside_the_tree(site: Path, tmp_path: Path) -> None:
    made = run_python(tmp_path, "-m", "forgekit", "init", "my work", PYTHONPATH=str(site))
    assert made.returncode == 0, made.stderr
    notebook = tmp_path / "my work" / "notebooks" / "01_text.ipynb"
    content = nbformat.read(notebook, as_version=4)
    content.cells.append(nbformat.v4.new_code_cell("print('package:', fk.__file__)"))
    nbformat.write(content, notebook)
    settings = [f"{name}={json.dumps(value)}" for name, value in SHORT.items()]
    command = ["-m", "forgekit", "run", "notebooks/01_text.ipynb", "--name", "short", "--set", *settings]
    variables = {name: value for name, value in os.environ.items() if name != "FORGEKIT_RUNS"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path / "my work",
        env=variables | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"package: {site / 'forgekit' / '__init__.py'}\n" in done.stdout
    assert (tmp_path / "my work" / "runs" / "short" / "models" / "lora" / "adapter_model.safetensors").is_file()
