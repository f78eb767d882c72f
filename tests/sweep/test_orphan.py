"""A run whose sweep is killed notices, as a kernel does whose supervisor is killed: it saves, says so and ends."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from forgekit.files import read_json
from forgekit.run_lock import is_locked
from forgekit.runs.supervise import PARENT, Supervisor

from .conftest import RATES, write_sweep
from .test_control import wait_for

pytestmark = pytest.mark.usefixtures("own_folder")

WAIT = """
import os, pathlib, time
import forgekit as fk

run = fk.start_run(fk.load_config(recipe, settings), run_name)
pathlib.Path("kernel").write_text(str(os.getpid()))
try:
    time.sleep(60)
finally:
    pathlib.Path("saved").write_text("yes")
"""


@pytest.mark.slow
def test_when_the_sweep_is_killed_its_runs_save_and_end(project_folder: Path) -> None:
    import nbformat

    notebook = nbformat.read("toy.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(WAIT))
    nbformat.write(notebook, "toy.ipynb")
    write_sweep(RATES)
    path = os.pathsep.join((str(project_folder), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-m", "forgekit", "sweep", "sweep.yaml"]
    sweep = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL)
    wait_for(lambda: Path("kernel").exists() and Path("kernel").read_text() != "", 120)
    supervisors = psutil.Process(sweep.pid).children()
    assert len(supervisors) == 1
    sweep.kill()
    sweep.wait()
    wait_for(lambda: not supervisors[0].is_running() or supervisors[0].status() == psutil.STATUS_ZOMBIE)
    folder = Path("runs", "rates-learning_rate-0.0005")
    wait_for(lambda: not is_locked(folder))
    assert not psutil.pid_exists(int(Path("kernel").read_text())) and Path("saved").read_text() == "yes"
    record = read_json(folder / "run.json")
    assert (record["state"], record["stopped_by"]) == ("stopped", "the death of the process that started it")


def test_without_a_parent_s_file_nothing_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PARENT, raising=False)
    supervisor = Supervisor()
    supervisor.follow_parent()
    assert supervisor.parent is None


def test_the_parent_s_file_is_this_process_s_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = os.pipe()
    os.set_inheritable(theirs, True)
    monkeypatch.setenv(PARENT, str(theirs))
    supervisor = Supervisor()
    supervisor.follow_parent()
    assert PARENT not in os.environ and not os.get_inheritable(theirs)
    import socket

    link, other = socket.socketpair()
    with link, other, supervisor.watch(link):
        time.sleep(0.5)
        assert supervisor.stop is None
        os.close(ours)
        wait_for(lambda: supervisor.stop is not None)
    assert supervisor.stop is not None and supervisor.stop.by == "the death of the process that started it"
    os.close(theirs)
