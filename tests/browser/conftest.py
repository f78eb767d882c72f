"""A real JupyterLab and a real voila on 127.0.0.1, and a headless Chromium that opens them."""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from forgekit.__main__ import main

FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()
SECONDS = 60_000  # milliseconds that a page may take for one thing; a busy machine starts a kernel slowly
# JupyterLab: no news, no updates, every cell in the page also when it is out of sight
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}


@dataclass(frozen=True)
class Server:
    """A web server that was started here."""

    address: str
    token: str
    folder: Path

    def find(self, path: str) -> str:
        """Return the whole address of a page."""
        return f"{self.address}{path}?token={self.token}"


def find_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def serve(folder: Path, project: Path, module: str, *options: str) -> Iterator[Server]:
    """Start a server as a module of this Python, wait until it answers, and end it, kernels included."""
    port, token = find_port(), secrets.token_hex(16)
    own = {name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR", "FORGEKIT_RUNS")}  # fmt: skip
    command = [sys.executable, "-m", module, *(option.format(port=port, token=token) for option in options)]
    write_settings(folder / "jupyterlab_settings_dir")
    with open(folder / "server.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | own | {"PYTHONPATH": find_python_path(project), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    server = Server(f"http://127.0.0.1:{port}", token, folder)
    try:
        wait_for(server, process)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def find_python_path(project: Path) -> str:
    """Return a path on which the kernel finds this checkout, behind what is there: another ipykernel, for instance."""
    return os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(project)])


def write_settings(folder: Path) -> None:
    for name, values in SETTINGS.items():
        path = folder / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")


def wait_for(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(server.find("/api/status"), timeout=5).close()
            return
        if process.poll() is not None:
            break
        time.sleep(0.2)
    pytest.fail(f"the server did not start:\n{(server.folder / 'server.log').read_text(encoding='utf-8')[-3000:]}")


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory, project_folder: Path) -> Iterator[Server]:
    """JupyterLab on a folder that `forgekit init` has filled with the notebooks and recipes."""
    folder = tmp_path_factory.mktemp("lab")
    assert main(["init", str(folder)]) == 0
    options = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port={port}"]
    options += ["--ServerApp.port_retries=0", "--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True"]
    with serve(folder, project_folder, "jupyterlab", *options) as server:
        yield server


@pytest.fixture(scope="module")
def voila(tmp_path_factory: pytest.TempPathFactory, project_folder: Path) -> Iterator[Server]:
    """Voila as an extension of a plain Jupyter server, on a folder of its own."""
    pytest.importorskip("voila", reason="needs voila: pip install forgekit[app]")
    folder = tmp_path_factory.mktemp("voila")
    options = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port={port}"]
    options += ["--ServerApp.port_retries=0", "--IdentityProvider.token={token}"]
    options += ["--ServerApp.jpserver_extensions={{'voila.server_extension': True}}"]
    with serve(folder, project_folder, "jupyter_server", *options) as server:
        yield server


@pytest.fixture(scope="session")
def browser(browser_path: str) -> Iterator[Any]:
    """Chromium, from the system."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install forgekit[test]")
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=browser_path, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def pictures(project_folder: Path) -> Path:
    """Where screenshots are put to be looked at; git ignores it."""
    folder = project_folder / "build" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
