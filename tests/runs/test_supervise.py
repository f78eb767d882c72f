"""Signals, limits and hung steps end a run in time, with what was running cleaned up and nothing left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from forgekit.errors import RunNameError
from forgekit.files import read_json
from forgekit.run_lock import lock_folder
from forgekit.runs import supervise
from forgekit.runs.supervise import Supervisor

from .conftest import CHILD, PARAMETERS, START, WAIT, Ended, is_gone, write_notebook

Execute = Callable[..., Ended]


def wait_for(found: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def signals_are_heard() -> Iterator[None]:
    """Under nohup, or started by a script in the background, pytest ignores these, and a supervisor ignores what it was told to ignore."""
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SIGTERM", 143),
        pytest.param("SIGINT", 130, marks=pytest.mark.slow),
        pytest.param("SIGHUP", 129, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_supervisor_lets_the_cell_clean_up_and_leaves_no_child(
    name: str, code: int, execute: Execute, record_case: Any
) -> None:
    case = record_case(what="run", point="a cell", action=name)
    ended = execute(
        START, WAIT.format(first=f"{CHILD}os.kill(os.getppid(), signal.{name})"), "print('never')", grace=20
    )
    record = ended.record
    assert (record["state"], record["stopped_by"], record["exit_code"], record["error"]) == (
        "stopped",
        name,
        code,
        None,
    )
    assert Path("saved").exists() and is_gone("kernel") and is_gone("child")
    assert ended.statuses() == ["completed", "failed", "pending"]
    assert f"This run was stopped by {name}." in ended.cells[0].source
    assert (ended.status["running"], ended.status["error"]) == (False, f"The run was stopped by {name}.")
    case["happened"] = "the cell cleaned up; recorded as stopped, no process left"
    assert "FORGEKIT_RUN" not in os.environ and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_kernel_that_does_not_end_is_killed_within_the_grace_period(execute: Execute, record_case: Any) -> None:
    case = record_case(what="run", point="a cell that ignores it", action="SIGTERM")
    stubborn = "signal.signal(signal.SIGINT, signal.SIG_IGN)\npathlib.Path('asked').write_text(str(time.time()))\n"
    ended = execute(START, WAIT.format(first=f"{stubborn}os.kill(os.getppid(), signal.SIGTERM)"), grace=2)
    written = (ended.folder / "run.json").stat().st_mtime
    assert written - float(Path("asked").read_text()) < 2 + 1  # the client looks once a second whether the kernel lives
    record = ended.record
    assert (record["state"], record["stopped_by"], record["exit_code"]) == ("stopped", "SIGTERM", 143)
    assert record["error"] == "the kernel was killed because it did not end within the grace period of 2 s"
    assert is_gone("kernel") and not Path("saved").exists()
    case["happened"] = "the kernel killed within the grace period; recorded as stopped"


@pytest.mark.slow
def test_a_second_signal_ends_the_run_at_once(execute: Execute) -> None:
    stubborn = "signal.signal(signal.SIGINT, signal.SIG_IGN)\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(3)\n"
    ended = execute(START, WAIT.format(first=f"{stubborn}os.kill(os.getppid(), signal.SIGINT)"))
    assert ended.record["error"] == "the kernel was killed because a second signal came"
    assert ended.seconds < 20


@pytest.mark.slow
def test_the_time_limit_stops_a_run(execute: Execute) -> None:
    ended = execute(START, WAIT.format(first=""), timeout=15)
    record = ended.record
    assert (record["state"], record["stopped_by"], record["exit_code"]) == ("stopped", "its time limit of 15 s", 1)
    assert Path("saved").exists()


def test_an_ignored_signal_stays_ignored_and_the_first_to_ask_is_remembered() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    try:
        supervisor = Supervisor()
        with supervisor.catch_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert supervisor.stop is None
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)  # at once: a wrapper sends Ctrl-C twice, and nobody is in a hurry
        assert supervisor.stop is not None and supervisor.stop.by == "SIGTERM" and not supervisor.hurry
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_nothing_is_caught() -> None:
    found = []

    def look() -> None:
        with Supervisor().catch_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


# ---- steps -----------------------------------------------------------------------------------------------------------


def test_a_hung_step_leaves_its_stacks_in_the_log_and_stops_the_run(
    execute: Execute, monkeypatch: pytest.MonkeyPatch, record_case: Any
) -> None:
    case = record_case(what="run", point="a step", action="hang")
    monkeypatch.setattr(supervise, "HANG_SECONDS", 1.0)
    hang = "from forgekit.link import tell\ntell(done=7, seconds=0.01)\ntell(step=8)\ndef wait_for_ever():\n    time.sleep(60)\nwait_for_ever()"
    ended = execute(START, WAIT.format(first="").replace("time.sleep(60)", hang.replace("\n", "\n    ")))
    record = ended.record
    assert (record["state"], record["exit_code"]) == ("stopped", 1)
    assert record["stopped_by"].startswith("its supervisor: step 2 since the start hung for 1 s, the stacks stand in")
    log = (ended.folder / "logs" / "training.log").read_text()
    assert "most recent call first" in log and "in wait_for_ever" in log
    assert Path("saved").exists()
    case["happened"] = "every stack in the log; stopped"


def test_a_step_hangs_after_ten_minutes_or_twenty_median_steps_and_grace_is_two_steps() -> None:
    supervisor = Supervisor()
    assert (supervisor.hang_limit(), supervisor.grace_seconds()) == (600, 30)
    supervisor.seconds.extend([1, 2, 300])
    assert (supervisor.hang_limit(), supervisor.grace_seconds()) == (600, 30)
    supervisor.seconds.extend([50, 60, 70])
    assert (supervisor.hang_limit(), supervisor.grace_seconds()) == (1100, 110)
    assert Supervisor(grace=5).grace_seconds() == 5


def test_a_step_that_an_error_cut_short_does_not_hang() -> None:
    supervisor = Supervisor()
    supervisor.take({"step": 1})
    for end in (supervisor.cell_ended, lambda: supervisor.take({"rest": True})):  # a cell may catch it and go on
        supervisor.step_began = time.monotonic() - 10_000
        end()
        supervisor.check_limits()
        assert supervisor.stop is None
    supervisor.step_began = time.monotonic() - 10_000
    supervisor.check_limits()
    assert supervisor.stop is not None


# ---- kill -9 of the supervisor ---------------------------------------------------------------------------------------


def start_command(project_folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "forgekit", "run", "toy.ipynb", "--name", "toy"]
    path = os.pathsep.join((str(project_folder), os.environ.get("PYTHONPATH", "")))
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL)


def test_when_the_supervisor_is_killed_the_kernel_saves_says_so_and_ends(
    project_folder: Path, record_case: Any
) -> None:
    case = record_case(what="run", point="a cell", action="`kill -9` of its supervisor")
    slow = "time.sleep(60)\nfinally:\n    time.sleep(1.5)"  # what it saves takes a while
    write_notebook(
        PARAMETERS, START, WAIT.format(first=CHILD).replace("time.sleep(60)\nfinally:", slow), "print('never')"
    )
    command = start_command(project_folder)
    wait_for(lambda: Path("child").exists() and Path("child").read_text() != "")
    folder = Path("runs/toy")
    command.kill()
    command.wait()
    with pytest.raises(RunNameError, match="is gone, but its kernel still saves there"):
        lock_folder(folder)
    wait_for(lambda: is_gone("kernel") and is_gone("child"))
    assert Path("saved").read_text() == "yes"
    record = read_json(folder / "run.json")
    assert (record["state"], record["stopped_by"]) == ("stopped", "the death of its supervisor")
    ended = Ended(folder.absolute(), 0)
    assert ended.statuses() == ["completed", "failed", "pending"]
    assert ended.metadata["forgekit"]["state"] == "stopped" and "the death of its supervisor" in ended.cells[0].source
    assert ended.status["running"] is False
    wait_for(lambda: is_free(folder))
    case["happened"] = "the kernel saved, recorded the end and ended"


def is_free(folder: Path) -> bool:
    try:
        lock_folder(folder).close()
    except RunNameError:
        return False
    return True
