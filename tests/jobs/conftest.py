"""A scheduler in this process, and a JupyterLab on 127.0.0.1 as `forgekit lab` starts it; each keeps its files to itself."""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest

PARAMETERS = 'recipe: str = ""\nsettings: dict = {}\nrun_name: str = ""'
START = "import forgekit as fk\n\nconfig = fk.load_config(recipe, settings)\nrun = fk.start_run(config, run_name)"


def write_notebook(path: Path, *sources: str) -> Path:
    """Write a notebook of code cells behind one tagged `parameters`."""
    cells = [nbformat.v4.new_code_cell(source) for source in (PARAMETERS, *sources)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def wait_for(found: Callable[[], Any], seconds: float = 120) -> Any:
    """Return what a function finds, once it finds something."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "nothing came in time"
        time.sleep(0.1)
    return value


VARIABLES = ("FORGEKIT_RUNS", "FORGEKIT_RUN", "FORGEKIT_SUPERVISED", "FORGEKIT_PARAMETERS", "FORGEKIT_JOBS")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A server's folder; no variable of another run reaches it."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "server's folder"
    path.mkdir()
    return path


@dataclass(frozen=True)
class Server:
    """A JupyterLab that was started here."""

    address: str
    token: str
    folder: Path
    log: Path

    def ask(self, path: str, method: str = "GET", body: Any = None) -> Any:
        """Return the JSON that the server answers; an error's answer has a `message`."""
        request = urllib.request.Request(
            f"{self.address}/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"token {self.token}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            text = error.read()
        return json.loads(text) if text else None

    def post(self, notebook: str, **parameters: Any) -> Any:
        """Make a job."""
        body = {"name": Path(notebook).stem, "input_uri": notebook, "runtime_environment_name": "forgekit"}
        return self.ask("scheduler/jobs", "POST", body | {"parameters": parameters})

    def job(self, id: str) -> Any:
        """Return a job."""
        return self.ask(f"scheduler/jobs/{id}")

    def wait(self, id: str, *states: str, seconds: float = 240) -> Any:
        """Return a job once it is in one of these states."""
        return wait_for(lambda: (job := self.job(id))["status"] in states and job, seconds)


@contextlib.contextmanager
def serve(folder: Path, project: Path, *options: str) -> Iterator[Server]:
    """Start `forgekit lab` in another folder than it serves, wait until it answers, and end it."""
    own = folder.parent / "jupyter"
    own.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server(f"http://127.0.0.1:{port}", secrets.token_hex(16), folder, own / "server.log")
    folders = {name: str(own / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}  # fmt: skip
    path = os.pathsep.join((str(project), os.environ.get("PYTHONPATH", "")))
    lab = ["--no-browser", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={server.token}"]  # fmt: skip
    with open(server.log, "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "forgekit", "lab", *lab, f"--ServerApp.root_dir={folder}", *options],
            cwd=own,
            env=os.environ | folders | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        wait_for(lambda: answers(server) or process.poll() is not None)
        assert process.poll() is None, server.log.read_text()[-3000:]
        yield server
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(server: Server) -> bool:
    try:
        return "version" in server.ask("api")
    except (OSError, ValueError):
        return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, project_folder: Path) -> Iterator[Server]:
    """JupyterLab on a folder of its own."""
    pytest.importorskip("jupyter_scheduler", reason="needs jupyter-scheduler: pip install forgekit[jobs]")
    folder = tmp_path_factory.mktemp("jobs") / "server's folder"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        with serve(folder, project_folder) as started:
            yield started
