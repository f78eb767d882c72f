"""A disk that is really full: a small file system in memory, in a mount namespace that ends with its process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forgekit.files import read_json
from forgekit.train.checkpoint import list_checkpoints, verify_checkpoint

from .breaking import EXACT, ONE, break_and_resume
from .conftest import Warm

STEPS = (1, 2, 9, 24)
MOUNT = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'


def in_small_disk(folder: Path, size: str) -> tuple[str, ...]:
    """Return the beginning of a command that is run with a file system of that size in a folder; skip where it cannot be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    reasons = []
    for namespace in (["unshare", "-Urm"], ["unshare", "-m"]):
        command = (*namespace, "sh", "-c", MOUNT, "sh", size, str(folder))
        try:
            tried = subprocess.run([*command, "true"], capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("needs `unshare` of util-linux")
        if tried.returncode == 0:
            return command
        reasons.append(tried.stderr.strip())
    pytest.skip(f"no file system can be mounted here: {'; '.join(reasons)}")


FILL = """
import json, os, sys
from pathlib import Path
from forgekit.errors import RunError
from forgekit.train.checkpoint import NEEDED, find_newest, list_checkpoints, verify_checkpoint, write_whole

folder = Path(sys.argv[1])

def write(to):
    (to / "adapter_model.safetensors").write_bytes(b"w" * 300_000)
    for name in NEEDED:
        (to / name).write_bytes(b"n" * 1000)

written, said = 0, ""
while not said:
    try:
        write_whole(folder / f"checkpoint-{written + 1}", write, {"step": written + 1})
        written += 1
    except RunError as error:
        said = str(error)
whole = [path.name for path in list_checkpoints(folder) if verify_checkpoint(path) is None]
names = sorted(path.name for path in folder.iterdir())
print(json.dumps([written, said, whole, names, find_newest(folder).name]))
"""


def test_checkpoints_fill_a_disk_until_one_is_refused_and_all_before_it_are_whole(
    tmp_path: Path, project_folder: Path, record_case: Any
) -> None:
    case = record_case(what="checkpoint", point="save after save", action="full tmpfs")
    command = [*in_small_disk(tmp_path / "disk", "1m"), sys.executable, "-c", FILL, str(tmp_path / "disk")]
    done = subprocess.run(command, cwd=project_folder, capture_output=True, text=True)
    written, said, whole, names, newest = json.loads(done.stdout)
    expected = [f"checkpoint-{number}" for number in range(1, written + 1)]
    assert written >= 2 and whole == names == expected and newest == expected[-1]
    assert f"checkpoint-{written + 1} could not be written: No space left on device (0." in said
    assert f"{expected[-1]} is the newest one and untouched" in said
    case["happened"] = "refused in one sentence; every checkpoint before it is whole"


# ---- a training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, project_folder: Path) -> Iterator[Warm]:
    """A warm process whose runs stand on a disk of 6 MB, which this process sees through /proc."""
    folder = tmp_path_factory.mktemp("small")
    process = SmallWarm(folder, project_folder, in_small_disk(folder / "runs", "6m"))
    yield process
    process.close()


class SmallWarm(Warm):
    def path(self, run: str) -> Path:
        return Path(f"/proc/{self.process.pid}/root{self.folder}/runs/{run}")


@pytest.mark.faults
@pytest.mark.parametrize("step", STEPS)
def test_a_training_on_a_disk_that_fills_up_goes_on_when_there_is_room(
    small: Warm, step: int, record_case: Any
) -> None:
    case = record_case(what="training", point="a step's beginning", action="full tmpfs")
    ballast = small.path("ballast")

    def free(run: Path) -> None:
        assert ballast.stat().st_size > 1_000_000
        checkpoints = list_checkpoints(run / "checkpoints")
        assert all(verify_checkpoint(path) is None for path in checkpoints)
        ballast.unlink()

    case["happened"] = break_and_resume(small, ONE, "", fill_at=step, between=free)
    assert case["happened"] in (f"ended by RunError; {EXACT}", f"ended by OSError; {EXACT}")


# ---- a whole run -----------------------------------------------------------------------------------------------------

CELL = """
import os
written = 0
with open(run.path.parent / "ballast", "wb", buffering=0) as file:
    try:
        while True:
            written += file.write(b"x" * 4096)
    except OSError as error:
        print("full after", written, error.strerror)
"""


@pytest.mark.faults
@pytest.mark.parametrize(("last", "state", "code"), [("print('the end')", "completed", 0), ("1 / 0", "failed", 1)])
def test_a_run_whose_disk_fills_up_still_says_how_it_ended(
    tmp_path: Path,
    project_folder: Path,
    write_notebook: Callable[..., Path],
    last: str,
    state: str,
    code: int,
    record_case: Any,
) -> None:
    case = record_case(what="run", point=f"a cell, the run {state}", action="full tmpfs")
    runs = tmp_path / "runs"
    notebook = write_notebook(tmp_path / "toy.ipynb", CELL, last)
    saved = tmp_path / "saved"
    copy = f'"$@"; code=$?; cp -r {runs}/toy {saved}; exit $code'
    run = (sys.executable, "-m", "forgekit", "run", str(notebook), "--name", "toy")
    variables = os.environ | {"PYTHONPATH": str(project_folder), "FORGEKIT_RUNS": str(runs)}
    command = [*in_small_disk(runs, "8m"), "sh", "-c", copy, "sh", *run]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    record = read_json(saved / "run.json")
    assert (done.returncode, record["state"]) == (code, state), done.stdout + done.stderr
    assert read_json(saved / "status.json")["running"] is False
    assert json.loads((saved / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    case["happened"] = "run.json, status.json and exit code say how it ended; the notebook is whole"
