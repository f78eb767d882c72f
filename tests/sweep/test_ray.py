"""Runs on a real Ray cluster of two nodes, one of which is lost; ray_cluster.py is what happens, here is what has to hold.

Half of each one's time is Ray's own start. Skipped where no network namespace can be made: Ray listens on all addresses.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("ray", reason='needs ray: pip install "forgekit[ray]"')

from ..runs.conftest import PARAMETERS, START, write_notebook
from ..runs.test_training import LOAD

SCRIPT = Path(__file__).with_name("ray_cluster.py")
NAMESPACES = (["unshare", "--net", "--uts"], ["unshare", "--map-root-user", "--net", "--uts"])


def find_namespace() -> list[str] | None:
    """Return the command that starts another one in a network of its own, or None where that is not allowed."""
    if shutil.which("unshare") is None:
        return None
    return next((way for way in NAMESPACES if not subprocess.run([*way, "true"], capture_output=True).returncode), None)


@pytest.fixture(scope="module")
def play(project_folder: Path) -> Callable[[Path, str], dict[str, Any]]:
    """Returns a function: folder, scenario -> what it told."""
    namespace = find_namespace()
    if namespace is None:
        pytest.skip("no network namespace can be made here: it takes root, or user namespaces, and `unshare`")

    def run(folder: Path, scenario: str) -> dict[str, Any]:
        own = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FORGEKIT_"))}
        environment = own | {"PYTHONPATH": os.pathsep.join([str(project_folder), own.get("PYTHONPATH", "")])}
        command = [*namespace, sys.executable, str(SCRIPT), str(folder), scenario]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
        logs = "".join(f"\n{path}:\n{path.read_text()[-2000:]}" for path in folder.glob("*.log"))
        assert done.returncode == 0, done.stdout + done.stderr + logs
        print(done.stdout)
        return json.loads((folder / "told.json").read_text())

    return run


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_whose_node_is_killed_goes_on_once_on_the_other(
    play: Callable[[Path, str], dict[str, Any]], tmp_path: Path
) -> None:
    told = play(tmp_path, "node")
    assert (told["nodes"], told["free"]) == (2, 1)  # one of them has a GPU
    assert told["seen"]["machine"] == "node-127-0-0-3" and told["seen"]["CUDA_VISIBLE_DEVICES"] == "0"
    assert told["seen"]["RAY_AUTH_TOKEN"] is None
    assert told["code"] == {"code": [3, None]}
    assert "needs 1 CPU cores and 5 GPUs of one node" in told["huge"]

    (code, reason) = told["lost"]["gpu"]
    assert code is None and reason.startswith("NodeDiedError: ")
    assert told["resumed"] == {"gpu": [0, None]}
    events = read_lines(tmp_path / "gpu" / "events.jsonl")
    assert [event["what"] for event in events] == ["begin", "begin", "end"]
    assert json.loads((tmp_path / "gpu" / "seen.json").read_text())["machine"] == "node-127-0-0-2"
    # nobody can tell a dead machine from a silent one, so the other began after `lost_seconds`, counted from when it looked
    assert 6 < told["resumed after"] < 6 + told["told after"] + 10
    steps = [line["step"] for line in read_lines(tmp_path / "gpu" / "logs" / "metrics.jsonl")]
    assert sorted(set(steps)) == list(range(1, 61)) and len(steps) <= 61

    assert told["stopped"] == {"long": [143, None], "queued": [143, "stopped before it began"]}
    assert [event["what"] for event in read_lines(tmp_path / "long" / "events.jsonl")] == [
        "begin",
        "saved after SIGTERM",
    ]
    assert not (tmp_path / "queued").exists()
    assert "joined" not in told["stranger"] and "RAY_AUTH_TOKEN_PATH" in told["stranger"]
    assert told["left"] == []
    assert not [process for process in psutil.process_iter(["cmdline"]) if names(process, told["sockets"])]


def names(process: psutil.Process, folder: str) -> bool:
    return folder in " ".join(process.info["cmdline"] or [])


@pytest.mark.slow
def test_nothing_of_a_run_outlives_its_raylet(play: Callable[[Path, str], dict[str, Any]], tmp_path: Path) -> None:
    told = play(tmp_path, "raylet")
    assert told["lost"]["gpu"][0] is None and told["resumed"] == {"gpu": [0, None]}
    events = read_lines(tmp_path / "gpu" / "events.jsonl")
    # Ray's worker notices and kills the command; of `forgekit run` the kernel would still save, as tests/runs shows
    assert [event["what"] for event in events] == ["begin", "begin", "end"]
    assert told["ended at"] < events[1]["at"]
    steps = [line["step"] for line in read_lines(tmp_path / "gpu" / "logs" / "metrics.jsonl")]
    assert sorted(set(steps)) == list(range(1, 61)) and len(steps) <= 61 and told["left"] == []


SLOWLY = """
import time
step = trainer.training_step

def train_slowly(*rest):
    time.sleep(0.2)
    return step(*rest)

trainer.training_step = train_slowly
trainer.train()
"""


@pytest.mark.slow
def test_a_training_whose_node_is_killed_ends_with_the_losses_of_one_that_was_not(
    play: Callable[[Path, str], dict[str, Any]],
    tmp_path: Path,
    tiny_folder: Path,
    orders_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_notebook(PARAMETERS, START, LOAD, SLOWLY)
    settings = {
        "data.path": orders_file,
        "model.id": tiny_folder,
        "model.engine": "huggingface",
        "model.device": "cpu",
        "model.load_in": "16bit",
        "model.max_length": 256,
        "adapter.lora_dropout": 0.1,
        "train.max_steps": 16,
        "train.save_steps": 5,
        "train.logging_steps": 1,
    }
    sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    (tmp_path / "arguments").write_text("\n".join(["run", "toy.ipynb", *sets]))
    told = play(tmp_path, "training")
    assert told["lost"]["torn"][0] is None and told["resumed"]["torn"] == [0, None]
    losses = {}
    for name in ("whole", "torn"):
        lines = [line for line in read_lines(tmp_path / name / "logs" / "metrics.jsonl") if "loss" in line]
        losses[name] = [(line["step"], line["loss"]) for line in lines]
    assert [step for step, _ in losses["whole"]] == list(range(1, 17))
    assert dict(losses["torn"]) == dict(losses["whole"])
    repeated = len(losses["torn"]) - 16
    assert 0 <= repeated <= 5  # save_steps
    assert len(json.loads((tmp_path / "torn" / "run.json").read_text())["attempts"]) == 1
