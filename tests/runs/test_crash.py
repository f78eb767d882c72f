"""Why a kernel died, as far as the system lets it be known."""

import signal
from pathlib import Path

import pytest

from forgekit.runs import crash
from forgekit.runs.crash import MemoryKills, describe_crash, read_kills
from forgekit.runs.outcome import Outcome


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of cgroup 2 that counts, in place of this machine's, and a system's log that says nothing."""
    file = tmp_path / "memory.events"
    file.write_text("low 0\nhigh 0\nmax 12\noom 2\noom_kill 2\noom_group_kill 0\n")
    monkeypatch.setattr(crash, "CGROUPS", tmp_path)
    monkeypatch.setattr(crash, "find_counter", lambda pid: file)
    monkeypatch.setattr(crash, "read_kernel_log", lambda: [])
    return file


def test_a_kill_that_the_cgroup_counted_is_out_of_memory(cgroup: Path) -> None:
    memory = MemoryKills(1)
    cgroup.write_text(cgroup.read_text().replace("oom_kill 2", "oom_kill 3"))
    outcome = describe_crash(-signal.SIGKILL, memory)
    assert (outcome.state, outcome.number, outcome.exit_code) == ("crashed", 9, 137)
    assert outcome.error == f"the kernel was killed because memory ran out ({cgroup} counts a kill for want of memory)"


def test_a_kill_that_nobody_counted_is_only_suspected(cgroup: Path) -> None:
    error = describe_crash(-signal.SIGKILL, MemoryKills(1)).error
    assert error is not None and "out of memory is the usual cause, and nothing readable here confirms it" in error


def test_the_systems_log_is_asked_for_this_process(cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["Out of memory: Killed process 4242 (python) total-vm:9kB", "Memory cgroup: Killed process 77 (other)"]
    monkeypatch.setattr(crash, "read_kernel_log", lambda: lines)
    assert f"the system's log says: {lines[0]}" in (describe_crash(-9, MemoryKills(4242)).error or "")
    assert "nothing readable here confirms it" in (describe_crash(-9, MemoryKills(424)).error or "")


@pytest.mark.parametrize(
    ("code", "words", "exit_code"),
    [
        (-signal.SIGSEGV, "the kernel was killed by SIGSEGV; see logs/training.log", 139),
        (3, "the kernel ended with exit code 3 while a cell was running", 1),
        (0, "the kernel ended with exit code 0 while a cell was running", 1),
        (None, "the kernel ended while a cell was running", 1),
    ],
)
def test_other_ends_say_what_is_known(code: int | None, words: str, exit_code: int) -> None:
    outcome = describe_crash(code, None)
    assert words in (outcome.error or "") and outcome.exit_code == exit_code


@pytest.mark.parametrize(
    ("text", "number"),
    [("oom_kill_disable 0\nunder_oom 0\noom_kill 7\n", 7), ("oom 3\n", None), ("", None)],
)
def test_both_kinds_of_cgroup_are_read(text: str, number: int | None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    assert read_kills(tmp_path / "file") == number
    assert read_kills(tmp_path / "missing") is None and read_kills(None) is None


def test_this_process_can_be_asked_without_harm() -> None:
    import os

    assert MemoryKills(os.getpid()).explain() is None


@pytest.mark.parametrize(
    ("outcome", "code", "sentence"),
    [
        (Outcome(), 0, "completed."),
        (Outcome("failed", "cell 3: ValueError: x"), 1, "failed: cell 3: ValueError: x."),
        (
            Outcome("gates_failed", "gates that did not pass: a"),
            3,
            "did not pass its gates: gates that did not pass: a.",
        ),
        (Outcome("stopped", by="SIGHUP", number=1), 129, "was stopped by SIGHUP."),
        (Outcome("stopped", by="its time limit of 5 s"), 1, "was stopped by its time limit of 5 s."),
        (Outcome("crashed", "the kernel was killed", number=11), 139, "crashed: the kernel was killed."),
    ],
)
def test_each_state_has_its_exit_code_and_sentence(outcome: Outcome, code: int, sentence: str) -> None:
    assert (outcome.exit_code, outcome.sentence()) == (code, sentence)
