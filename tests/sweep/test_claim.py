"""Two machines never have one run: whoever is silent has ended before anybody else begins."""

import json
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from forgekit.errors import RunError
from forgekit.run_lock import LOCK, boot_id, describe_process, lock_folder
from forgekit.sweep import claim
from forgekit.sweep.claim import CUT_OFF, REPLACED, SILENT, STOP, TAKEN, Claim, find_folder, order
from forgekit.sweep.job import Job

SECONDS = 1.5  # after which a machine counts as lost; less, and a busy disk looks like one


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job("toy", tmp_path, ("--name", "toy"), tmp_path)


class Machine:
    """A claim whose machine has another name."""

    def __init__(self, job: Job, attempt: str, monkeypatch: pytest.MonkeyPatch):
        self.claim = Claim(job, attempt, SECONDS)
        self.alive = True
        told = describe_process() | {"machine": "elsewhere"}
        monkeypatch.setattr(claim, "describe_process", lambda: told)
        assert self.claim.take() is None
        monkeypatch.undo()
        self.words: list[str | None] = []

    def live(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.words.append(self.claim.look())
            time.sleep(0.05)


def test_the_first_attempt_has_the_run_at_once_and_gives_it_back(job: Job) -> None:
    order(job, "a")
    first = Claim(job, "a")
    began = time.monotonic()
    assert first.take() is None and not first.follows_a_loss
    assert first.look() is None
    first.release()
    order(job, "b")
    second = Claim(job, "b")
    assert second.take() is None and not second.follows_a_loss
    assert time.monotonic() - began < 10


def test_another_machine_waits_as_long_as_the_first_one_counts(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    order(job, "a")
    first = Machine(job, "a", monkeypatch)
    order(job, "b")
    second, took = Claim(job, "b", SECONDS), []
    waiting = threading.Thread(target=lambda: took.append((second.take(), time.monotonic())))
    waiting.start()
    first.live(SECONDS * 1.5)
    silent_since = time.monotonic()
    assert not took and set(first.words) == {REPLACED}
    waiting.join(10)
    assert took[0][0] is None and took[0][1] - silent_since > SECONDS * 0.9 and second.follows_a_loss
    first.claim.looked_at = 0
    assert first.claim.look() == TAKEN  # it wakes up
    first.claim.release()
    assert second.is_ours()


def test_a_machine_that_cannot_write_ends_before_anybody_else_begins(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    order(job, "a")
    first = Machine(job, "a", monkeypatch)
    began = first.claim.raised_at
    monkeypatch.setattr(Claim, "write", lambda self, **more: False)
    heard: dict[str | None, float] = {}
    while CUT_OFF not in heard:
        heard.setdefault(first.claim.look(), time.monotonic() - began)
        time.sleep(0.02)
        assert time.monotonic() - began < SECONDS
    assert SECONDS / 3 < heard[SILENT] < heard[CUT_OFF] and heard[CUT_OFF] > SECONDS * 2 / 3


def test_a_claim_of_a_process_that_has_ended_here_binds_nobody(job: Job) -> None:
    order(job, "a")
    program = (
        "import sys; from pathlib import Path; from forgekit.sweep.claim import Claim; from forgekit.sweep.job import Job\n"
        "Claim(Job('toy', Path(sys.argv[1]), (), Path(sys.argv[1])), 'a').take()"
    )
    subprocess.run([sys.executable, "-c", program, job.root], check=True)
    began = time.monotonic()
    second = Claim(job, "a")  # the same attempt: Slurm has requeued it
    assert second.take() is None and second.follows_a_loss
    assert time.monotonic() - began < 5


def test_what_the_machine_before_still_saves_is_waited_for(job: Job) -> None:
    run = job.root / job.name
    run.mkdir()
    lock = lock_folder(run)
    threading.Timer(1.0, lock.close).start()
    order(job, "a")
    began = time.monotonic()
    assert Claim(job, "a", 30).take() is None
    assert time.monotonic() - began > 0.9


def test_stop_and_a_newer_attempt_are_heard_while_waiting_and_while_running(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    order(job, "a")
    first = Machine(job, "a", monkeypatch)
    order(job, "a", stop=1)
    first.live(0.3)
    assert first.words[-1] == STOP
    assert Claim(job, "a", SECONDS).take() == STOP
    order(job, "b")
    assert Claim(job, "a", SECONDS).take() == REPLACED
    assert Claim(job, "b", SECONDS).take(lambda: True) == STOP


def test_a_claim_that_cannot_be_read_is_nobodys_only_after_silence(job: Job) -> None:
    order(job, "a")
    (find_folder(job) / "claim.json").write_text('{"attempt": ')
    began = time.monotonic()
    assert Claim(job, "a", SECONDS).take() is None
    assert time.monotonic() - began > SECONDS


def test_the_lock_file_of_a_lost_machine_is_emptied_and_no_others(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    run = job.root / job.name
    run.mkdir()
    for machine, kept in (("elsewhere", False), ("somewhere", True)):
        (find_folder(job) / "claim.json").unlink(missing_ok=True)
        order(job, "a")
        Machine(job, "a", monkeypatch)
        (run / LOCK).write_text(json.dumps({"pid": 1, "machine": machine}))
        order(job, "b")
        assert Claim(job, "b", SECONDS).take() is None
        assert bool((run / LOCK).read_text()) is kept


def test_a_machine_that_does_not_see_the_folder_says_so(job: Job) -> None:
    with pytest.raises(RunError, match=r"every machine of the cluster shares"):
        Claim(job, "a").take()


def test_an_order_that_cannot_be_written_is_an_error_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"):
        order(Job("toy", tmp_path / "file", (), tmp_path), "a")


HERE = {"machine": platform.node(), "boot": boot_id()}


@pytest.mark.parametrize(
    ("given", "over"),
    [
        (None, False),
        ({}, True),
        ({"ended": True, "process": HERE | {"machine": "elsewhere"}}, True),
        ({"process": HERE | {"pid": 2**22 + 1}}, True),
        ({"process": HERE | {"machine": "elsewhere", "pid": 2**22 + 1}}, False),
        ({"process": HERE | {"boot": "another machine of this name", "pid": 2**22 + 1}}, False),
        ({"process": describe_process()}, False),
    ],
)
def test_whose_claim_is_over(given: dict[str, Any] | None, over: bool) -> None:
    assert claim.is_over(given) is over
