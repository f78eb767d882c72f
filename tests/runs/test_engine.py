"""What the executed notebook says is what happened, and run.json says the same."""

import errno
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from papermill.engines import papermill_engines

from forgekit.errors import ConfigError
from forgekit.files import read_json
from forgekit.runs import engine
from forgekit.runs.engine import ForgekitEngine
from forgekit.runs.headless import run_notebook

from .conftest import CHILD, PARAMETERS, START, Ended, is_gone, write_notebook

KILL = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
Execute = Callable[..., Ended]


HOSTILE = '"); import pathlib; pathlib.Path("pwned").touch(); ("'


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A run with a hostile parameter, an error that is allowed and one that is not."""
    folder = tmp_path_factory.mktemp("failed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("FORGEKIT_RUNS", str(folder / "runs"))
        sources = (START, "print(settings['data.instruction'])", "1 / 0", "raise ValueError('3 < 4')", "print('never')")
        notebook = write_notebook(PARAMETERS, *sources, tags={0: ["parameters"], 3: ["raises-exception"]})
        run = run_notebook(notebook, None, {"data.instruction": HOSTILE, "train.seed": 5}, "toy")
    return Ended(run.path, 0.0)


def test_a_failed_cell_is_marked_and_nothing_behind_it_ran(failed: Ended) -> None:
    assert failed.statuses() == ["completed", "completed", "completed", "failed", "pending"]
    record = failed.record
    assert (record["state"], record["error"], record["cell"]) == ("failed", "cell 6: ValueError: 3 < 4", 6)
    assert record["exit_code"] == 1
    assert failed.metadata["forgekit"] == {"state": "failed", "error": record["error"], "cell": 6}
    assert failed.cells[-1].execution_count is None and failed.cells[-1].outputs == []


def test_a_banner_links_to_the_failed_cell(failed: Ended) -> None:
    banner, *cells = failed.cells
    assert "color:red" in banner.source and "This run failed: cell 6: ValueError: 3 &lt; 4." in banner.source
    assert '<a href="#papermill-error-cell">In [6]</a>' in banner.source
    anchor = next(number for number, cell in enumerate(cells) if 'id="papermill-error-cell"' in cell.source)
    assert cells[anchor + 1].source == "raise ValueError('3 < 4')"


def test_an_allowed_error_does_not_end_the_run_and_stays_in_the_notebook(failed: Ended) -> None:
    cell = next(cell for cell in failed.cells if cell.source == "1 / 0")
    assert [output.ename for output in cell.outputs] == ["ZeroDivisionError"]


def test_parameters_are_data_and_never_code(failed: Ended) -> None:
    cell = next(cell for cell in failed.cells if "injected-parameters" in cell.metadata.tags)
    assert "pwned" not in cell.source and "train.seed" not in cell.source
    assert read_json(failed.folder / "parameters.json")["settings"] == {"data.instruction": HOSTILE, "train.seed": 5}
    shown = next(cell for cell in failed.cells if cell.source.startswith("print(settings"))
    assert shown.outputs[0].text == HOSTILE + "\n"
    assert not (failed.folder.parent.parent / "pwned").exists()


def test_a_killed_kernel_is_recorded_within_five_seconds_and_no_later_cell_says_completed(
    execute: Execute, record_case: Any
) -> None:
    case = record_case(what="run", point="a cell", action="`kill -9` of its kernel")
    note = f"import pathlib, subprocess, time\n{CHILD}pathlib.Path('killed').write_text(str(time.time()))\n"
    ended = execute(START, note + KILL, "print('never')")
    assert (ended.folder / "run.json").stat().st_mtime - float(Path("killed").read_text()) < 5
    assert is_gone("child"), "what the kernel had started was left behind"
    assert ended.statuses() == ["completed", "failed", "pending"]
    record = ended.record
    assert (record["state"], record["signal"], record["exit_code"], record["cell"]) == ("crashed", "SIGKILL", 137, 4)
    (output,) = ended.cells[-2].outputs
    assert (output.output_type, output.ename) == ("error", "DeadKernelError")
    assert (ended.status["running"], ended.status["error"]) == (False, f"The run crashed: {record['error']}.")
    assert "This run crashed" in ended.cells[0].source and ended.metadata["forgekit"]["state"] == "crashed"
    case["happened"] = "recorded as crashed within 5 s; no later cell says completed"


@pytest.mark.slow
def test_papermills_own_engine_says_completed_of_cells_that_never_ran(own_folder: Path) -> None:
    """The defect that the engine exists for: once papermill mends it, this test says so."""
    from nbclient.exceptions import DeadKernelError

    notebook = write_notebook(PARAMETERS, KILL, "print('never')")
    with pytest.raises(DeadKernelError):
        papermill.execute_notebook(str(notebook), "out.ipynb", progress_bar=False, kernel_name="python3")
    cells = nbformat.read("out.ipynb", as_version=4).cells
    assert [cell.metadata["papermill"]["status"] for cell in cells] == ["completed"] * 3


def test_a_full_disk_keeps_the_notebook_of_before_and_the_run_goes_on(
    execute: Execute, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The folder's name has braces, which papermill would fill in."""
    monkeypatch.setenv("FORGEKIT_RUNS", str(tmp_path / "runs {of} {0}"))
    write, full = engine.write_text, []

    def refuse(path: Path, text: str) -> None:
        if '"goes on' in text or full:
            full.append(path)
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    monkeypatch.setattr(engine, "write_text", refuse)
    ended = execute(START, "print('goes on')", "import pathlib\npathlib.Path('end').touch()")
    assert full and Path("end").exists() and ended.record["state"] == "completed"
    assert ended.statuses()[0] == "completed", "the notebook is whole and from before the disk was full"
    assert [file.name for file in ended.folder.glob(".notebook*")] == []


# ---- plain papermill -------------------------------------------------------------------------------------------------


@pytest.fixture
def registered() -> None:
    """The engine as its entry point registers it."""
    papermill_engines.register("forgekit", ForgekitEngine)


def run_papermill(notebook: Path, **parameters: object) -> None:
    papermill.execute_notebook(
        str(notebook), "out.ipynb", parameters, engine_name="forgekit", kernel_name="python3", progress_bar=False
    )


def test_plain_papermill_gets_the_run_folder_the_lock_and_an_honest_notebook(registered: None) -> None:
    notebook = write_notebook(PARAMETERS, START, "print('run', run.path.name)\n1 / 0", "print('never')")
    with pytest.raises(papermill.PapermillExecutionError, match="ZeroDivisionError"):
        run_papermill(notebook, run_name="plain", settings={"train.seed": 9})
    record = read_json(Path("runs/plain/run.json"))
    assert (record["state"], record["error"]) == ("failed", "cell 4: ZeroDivisionError: division by zero")
    assert record["settings"]["train.seed"]["value"] == 9
    cells = nbformat.read("out.ipynb", as_version=4).cells
    assert [cell.metadata["papermill"]["status"] for cell in cells if cell.cell_type == "code"][-2:] == [
        "failed",
        "pending",
    ]
    assert sum("papermill-error-cell" in cell.source for cell in cells) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recpie": "a.yaml"}, "recpie: the notebook has no such parameter. Did you mean recipe?"),
        ({"settings": {"train.sede": 1}}, "train.sede: no such setting (from notebook). Did you mean train.seed?"),
    ],
)
def test_plain_papermill_is_refused_before_a_kernel_starts(given: dict, message: str, registered: None) -> None:
    notebook = write_notebook(PARAMETERS, START, "import pathlib\npathlib.Path('started').touch()")
    with pytest.raises(ConfigError) as caught:
        run_papermill(notebook, **given)
    assert str(caught.value) == message
    assert not Path("runs").exists() and not Path("started").exists() and not Path("out.ipynb").exists()


def test_papermills_command_finds_the_engine_also_for_a_notebook_of_somebody_else(
    project_folder: Path, tmp_path: Path
) -> None:
    """The entry points are those of pyproject.toml, as an installation writes them beside the package."""
    groups = tomllib.loads((project_folder / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in points.items())
        for group, points in groups.items()
    ]
    installed = tmp_path / "site" / "forgekit-0.1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "entry_points.txt").write_text("\n".join(lines))
    stopped = "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)"
    notebook = write_notebook("1 / 0", stopped, tags={0: ["raises-exception"]})
    path = os.pathsep.join((str(installed.parent), str(project_folder)))
    command = [
        sys.executable,
        "-m",
        "papermill",
        "--engine",
        "forgekit",
        str(notebook),
        "out.ipynb",
        "--no-progress-bar",
    ]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 143, done.stderr[-2000:]
    written = nbformat.read("out.ipynb", as_version=4)
    assert written.metadata["forgekit"]["stopped_by"] == "SIGTERM to its kernel"
    assert [c.metadata["papermill"]["status"] for c in written.cells if c.cell_type == "code"] == [
        "completed",
        "failed",
    ]
    assert not Path("runs").exists()
