"""One process writes a run's folder at a time, whatever becomes of the others."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from forgekit import run_lock
from forgekit.errors import RunError, RunNameError
from forgekit.files import read_json
from forgekit.run_lock import describe_process, lock_folder

OWNER = """
import sys
import time
from pathlib import Path
from forgekit.run_lock import lock_folder
lock = lock_folder(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def owner(tmp_path: Path, project_folder: Path):
    """Another process that holds the lock of tmp_path."""
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    process = subprocess.Popen(command, cwd=project_folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_with_the_owners_number(owner: subprocess.Popen, tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        lock_folder(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} is in use by process {owner.pid}. Choose another run_name, or end that process first."
    )
    with pytest.raises(RunError, match=f"by process {owner.pid}"):  # asking does not take the number away
        lock_folder(tmp_path)


def test_the_lock_is_free_when_its_owner_is_killed(owner: subprocess.Popen, tmp_path: Path) -> None:
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    lock_folder(tmp_path).close()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_child_that_inherits_the_lock_keeps_it_when_its_parent_is_killed(
    tmp_path: Path, project_folder: Path
) -> None:
    code = OWNER.replace(
        "sys.stdin.read()",
        "import subprocess\nchild = subprocess.Popen(['sleep', '60'], pass_fds=[lock.fileno()], stdout=subprocess.DEVNULL)\nprint(child.pid, flush=True)\nsys.stdin.read()",
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    parent = subprocess.Popen(command, cwd=project_folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "locked\n"
    child = int(parent.stdout.readline())
    try:
        parent.kill()
        parent.communicate()
        with pytest.raises(RunNameError, match=f"process {parent.pid} is gone, but its kernel still saves there"):
            lock_folder(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
    for _ in range(100):  # the system frees it when the child is gone
        try:
            return lock_folder(tmp_path).close()
        except RunNameError:
            time.sleep(0.05)
    pytest.fail("the lock outlived both processes")


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without flock, as some network ones are."""
    import fcntl

    def refuse(*args: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, False),
        ({"pid": 2**22 - 1}, True),
        ({"boot": "of another start of this machine"}, True),
        ({"started": 1000.0}, True),
        ({"machine": "elsewhere", "boot": "its own"}, False),
    ],
)
def test_without_flock_the_owners_number_start_and_boot_decide(
    change: dict, taken: bool, no_flock: None, tmp_path: Path
) -> None:
    text = json.dumps(describe_process() | change)
    (tmp_path / ".lock").write_text(text)
    if taken:
        lock_folder(tmp_path).close()
        assert json.loads((tmp_path / ".lock").read_text()) == describe_process()
    else:
        with pytest.raises(RunNameError, match="is in use by process"):
            lock_folder(tmp_path)
        assert (tmp_path / ".lock").read_text() == text


RACER = """
import sys
import time
from pathlib import Path
from forgekit.errors import RunNameError
from forgekit.run_folder import open_run
print("ready", flush=True)
for line in sys.stdin:
    try:
        run = open_run(Path(line.strip()), resume=True)
        run.update(winner=sys.argv[1])
        print("won", flush=True)
    except RunNameError:
        print("lost", flush=True)
"""


def read_folder(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return every byte of a folder, and when each file was written, in nanoseconds."""
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.rglob("*")}


def test_of_two_runs_in_one_folder_one_wins_each_time_and_the_loser_changes_nothing(
    tmp_path: Path, project_folder: Path, record_case: Any
) -> None:
    """Both begin at once; then the loser tries again three times, and no byte of what the winner wrote is another."""
    case = record_case(what="folder", point="its lock", action="two runs at once", times=20)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, name],
            cwd=project_folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    pipes = [(racer.stdin, racer.stdout) for racer in racers]
    for _, answers in pipes:
        assert answers and answers.readline() == "ready\n"
    for number in range(20):
        folder = tmp_path / f"run-{number}"
        for orders, _ in pipes:
            assert orders
            orders.write(f"{folder}\n")
            orders.flush()
        answers_ = [answers.readline().strip() for _, answers in pipes if answers]
        assert sorted(answers_) == ["lost", "won"]
        winner = racers[answers_.index("won")]
        assert read_json(folder / "run.json")["winner"] == "ab"[answers_.index("won")]
        assert json.loads((folder / ".lock").read_text())["pid"] == winner.pid
        before = read_folder(folder)
        assert before.keys() == {".lock", "run.json"}, "the loser left a file"
        loser = racers[answers_.index("lost")]
        for _ in range(3):
            loser.stdin.write(f"{folder}\n")
            loser.stdin.flush()
            assert loser.stdout.readline() == "lost\n"
        assert read_folder(folder) == before, "the loser changed a byte"
    case["happened"] = "one winner each time; no byte changed by the loser"
    for racer in racers:
        racer.communicate()


def test_a_look_at_the_lock_does_not_refuse_a_run_that_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`is_locked` has the lock for a moment; nobody alive has signed it, so the run waits for that moment."""
    import fcntl

    lock_folder(tmp_path).close()
    (tmp_path / run_lock.LOCK).write_text("")
    with open(tmp_path / run_lock.LOCK, "r+") as looking:
        fcntl.flock(looking, fcntl.LOCK_EX)
        monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: looking.close())
        lock_folder(tmp_path).close()
