"""A warm process that forks trainings and breaks them, and what is compared afterwards."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WARM = Path(__file__).with_name("warm.py")
STEPS = 24


class Warm:
    """Runs trainings of the folder, one after another; see warm.py for what a job may hold."""

    def __init__(self, folder: Path, project: Path):
        self.folder, self.expected, self.used = folder, {}, 0
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1"}
        environment.pop("FORGEKIT_FAULT", None)
        self.process = subprocess.Popen(
            [sys.executable, str(WARM), str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(folder / "warm.log", "w"),  # noqa: SIM115
            text=True, env=environment, cwd=project,
        )  # fmt: skip
        assert self.answer() == "ready", (folder / "warm.log").read_text()[-3000:]

    def answer(self) -> Any:
        line = self.process.stdout.readline()
        return json.loads(line) if line else "the warm process ended"

    def train(self, run: str, **job: Any) -> int:
        """Run one job; return its exit code, or minus the signal that ended it."""
        self.process.stdin.write(json.dumps({"folder": str(self.folder), "run": run, **job}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def new_run(self) -> str:
        self.used += 1
        return f"run-{self.used}"

    def path(self, run: str) -> Path:
        return self.folder / "runs" / run

    def read_losses(self, run: str) -> list[tuple[int, float]]:
        """Return step and loss of each line of metrics.jsonl, steps that were done twice included."""
        lines = self.read_lines(run, "metrics.jsonl")
        return [(row["step"], row["loss"]) for row in map(json.loads, lines) if "loss" in row]

    def read_hashes(self, run: str, step: int = STEPS) -> dict[str, str]:
        """Return the hash of each file of a checkpoint that holds numbers, weights, moments and schedule."""
        manifest = json.loads((self.path(run) / "checkpoints" / f"checkpoint-{step}" / "manifest.json").read_text())
        numbers = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
        return {file["name"]: file["sha256"] for file in manifest["files"] if file["name"] in numbers}

    def uninterrupted(self, settings: dict[str, Any]) -> tuple[dict[int, float], dict[str, str]]:
        """Return the losses and hashes of a training with these settings that nothing disturbs; each is run once."""
        key = json.dumps(settings, sort_keys=True)
        if key not in self.expected:
            run = self.new_run()
            assert self.train(run, settings=settings) == 0, self.log(run)
            self.expected[key] = dict(self.read_losses(run)), self.read_hashes(run)
        return self.expected[key]

    def log(self, run: str) -> str:
        return (self.folder / f"{run}.log").read_text(encoding="utf-8")[-3000:]

    def starts(self, run: str) -> list[int]:
        """Return the steps that the run's trainings started at."""
        lines = self.read_lines(run, "training.log")
        return [int(line.split()[5]) for line in lines if "training starts at step" in line]

    def read_lines(self, run: str, name: str) -> list[str]:
        """Return the lines of a log, none when the training was killed before it began one."""
        path = self.path(run) / "logs" / name
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def remove(self, run: str) -> None:
        shutil.rmtree(self.path(run))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory, project_folder: Path) -> Iterator[Warm]:
    process = Warm(tmp_path_factory.mktemp("warm"), project_folder)
    yield process
    process.close()


FAULTS = {"kill9": "`kill -9`", "term": "SIGTERM", "exception": "exception", "disk_full": "disk full"}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the README's table: how many trainings were broken in which way, and how many of them resumed bit for bit."""
    counts: dict[str, list[int]] = {}
    said = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            found = re.search(r"test_every_step_and_every_fault\[\d+-\w+-(\w+)\]", report.nodeid)
            if found and report.when == "call":
                counts.setdefault(found.group(1), [0, 0])[outcome == "failed"] += 1
            said += [text for name, text in report.user_properties if name == "kills" and report.when == "call"]
    if not counts and not said:
        return
    terminalreporter.section("trainings that were broken on purpose")
    terminalreporter.write_line("| broken by | trainings | resumed bit for bit |")
    terminalreporter.write_line("|---|---|---|")
    for fault, (passed, failed) in sorted(counts.items()):
        terminalreporter.write_line(f"| {FAULTS[fault]} at a chosen step | {passed + failed} | {passed} |")
    for line in said:
        terminalreporter.write_line(line)
