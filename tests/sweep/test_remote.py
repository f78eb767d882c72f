"""One attempt on one machine: its end, its signals, its variables, and a run that outlives it only to save."""

import json
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from forgekit.files import write_json
from forgekit.run_lock import boot_id
from forgekit.sweep import remote
from forgekit.sweep.claim import CLAIM, Claim, find_folder, order
from forgekit.sweep.job import End, Job
from forgekit.sweep.remote import Attempt, kill_tree

COMMAND = (sys.executable, str(Path(__file__).with_name("stand_in.py")))


def make_job(root: Path, *arguments: str, name: str = "toy", **values: Any) -> Job:
    environment = {"FORGEKIT_RUNS": str(root), "WORD": "given"}
    return Job(name, root, ("--name", name, *arguments), root, environment=environment, **values)


def read_events(job: Job) -> list[dict[str, Any]]:
    path = job.root / job.name / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(found: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def start_elsewhere(job: Job, attempt: str = "a") -> subprocess.Popen[bytes]:
    """Run an attempt in a process of its own, as Ray and Slurm do, and wait for its run to begin."""
    order(job, attempt)
    program = (
        "import sys, pickle; from forgekit.sweep.remote import Attempt\n"
        f"print(Attempt(pickle.loads(bytes.fromhex(sys.argv[1])), {attempt!r}, {COMMAND!r}).run().code)"
    )
    import pickle

    process = subprocess.Popen([sys.executable, "-c", program, pickle.dumps(job).hex()], stdout=subprocess.PIPE)
    wait_for(lambda: read_events(job))
    return process


def test_exit_code_output_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret" * 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for gpus, seen in ((0, ""), (2, "0,1")):
        job = make_job(tmp_path, "--code", "3", gpus=gpus, name=f"toy{gpus}", log=tmp_path / "logs" / f"{gpus}.log")
        order(job, "a")
        assert Attempt(job, "a", COMMAND).run() == End(3)
        told = json.loads((tmp_path / job.name / "seen.json").read_text())
        assert (told["CUDA_VISIBLE_DEVICES"], told["RAY_AUTH_TOKEN"], told["WORD"]) == (seen, None, "given")
        assert told["folder"] == str(tmp_path)
        assert job.log and job.log.read_text() == "from step 0\n"
        assert json.loads((find_folder(job) / CLAIM).read_text())["ended"]


def test_a_second_stop_is_a_second_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TWICE_SECONDS", -0.8)  # so that 0.2 s lie between two
    job = make_job(tmp_path)
    attempt, sent = Attempt(job, "a", COMMAND), []
    process: Any = SimpleNamespace(terminate=lambda: sent.append(time.monotonic()))
    for stop, signals in ((0, 0), (1, 1), (2, 2), (3, 2)):
        order(job, "a", stop)
        attempt.claim.looked_at = -1e9
        attempt.claim.raised_at = time.monotonic()
        for _ in range(4):
            attempt.look_after(process)
            time.sleep(0.1)
        assert len(sent) == signals
    assert sent[1] - sent[0] > 0.2


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_reaches_the_run_which_saves(how: signal.Signals, tmp_path: Path) -> None:
    job = make_job(tmp_path, "--steps", "600")
    process = start_elsewhere(job)
    process.send_signal(how)
    assert process.communicate()[0] == b"143\n"
    assert [event["what"] for event in read_events(job)] == ["begin", "saved after SIGTERM"]


def test_an_order_to_stop_reaches_the_run_which_saves(tmp_path: Path) -> None:
    job = make_job(tmp_path, "--steps", "600")
    order(job, "a")
    attempt = Attempt(job, "a", COMMAND, lost_seconds=9)  # it looks twice a second
    attempt.claim.take()
    attempt.start()
    wait_for(lambda: read_events(job))
    order(job, "a", stop=1)
    assert attempt.follow() == End(143)
    assert [event["what"] for event in read_events(job)] == ["begin", "saved after SIGTERM"]


def test_when_its_process_is_killed_the_run_saves_and_the_next_attempt_waits_for_that(tmp_path: Path) -> None:
    job = make_job(tmp_path, "--steps", "600", "--save", "1.5")
    process = start_elsewhere(job)
    process.kill()
    process.communicate()
    order(job, "b")
    short = make_job(tmp_path, "--steps", "3")
    assert Attempt(short, "b", COMMAND).run() == End(0)
    events = read_events(job)
    assert [event["what"] for event in events] == ["begin", "saved after parent", "begin", "end"]
    assert events[1]["at"] <= events[2]["at"]


def test_a_run_that_would_not_end_is_killed_before_another_machine_may_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, "--steps", "600", "--deaf")
    order(job, "a")
    attempt = Attempt(job, "a", COMMAND, lost_seconds=3)
    attempt.claim.take()
    attempt.start()
    wait_for(lambda: read_events(job))
    attempt.claim.raised_at = time.monotonic()
    monkeypatch.setattr(Claim, "write", lambda self, **more: False)  # the shared folder is gone
    began = time.monotonic()
    assert attempt.follow().code == 128 + signal.SIGKILL
    assert 2 < time.monotonic() - began < 3
    assert not psutil.pid_exists(read_events(job)[0]["pid"])


def test_a_run_that_had_ended_when_its_machine_was_lost_is_not_run_again(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    for state, code, ended in (("completed", 0, True), ("gates_failed", 3, True), ("stopped", 0, False)):
        write_json(tmp_path / job.name / "run.json", {"state": state, "exit_code": code})
        write_json(
            find_folder(job) / CLAIM, {"holder": "x", "process": {"machine": platform.node(), "boot": boot_id()}}
        )
        order(job, "b")
        end = Attempt(job, "b", COMMAND).run()
        assert (end.code, bool(read_events(job))) == (code, not ended)


def test_what_is_missing_on_the_machine_is_said(tmp_path: Path) -> None:
    job = Job("toy", tmp_path, (), tmp_path / "absent")
    assert "every machine of the cluster shares" in str(Attempt(job, "a", COMMAND).run().reason)
    order(job, "a")
    end = Attempt(job, "a", COMMAND).run()
    assert end.code == 1 and "absent" in str(end.reason)


def test_kill_tree_reaches_groups_of_their_own() -> None:
    parent = subprocess.Popen(["setsid", "-w", "sh", "-c", "setsid sleep 600 & wait"])
    wait_for(lambda: any(child.name() == "sleep" for child in psutil.Process(parent.pid).children(recursive=True)))
    children = psutil.Process(parent.pid).children(recursive=True)
    kill_tree(parent.pid)
    parent.wait()
    wait_for(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children))
    kill_tree(parent.pid)  # gone: nothing to do


def test_the_default_command_is_this_python() -> None:
    assert Attempt(Job("toy", Path("/"), (), Path("/")), "a").command == (sys.executable, "-m", "forgekit")
    assert remote.NOT_BEGUN.code == 143
