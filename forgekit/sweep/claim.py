"""One machine at a time works on a run, agreed on over nothing but a folder that all of them see.

root/.jobs/<name>/
  order.json   from the sweep: which attempt it wants, and whether that is to stop
  claim.json   from the machine that has the run: who it is, and a count that rises as long as it can write it

Two guards stand behind each other. The run's own lock (run_lock.py) is exact where flock reaches: on one machine, and on
network file systems that pass it on. Some do not (a Lustre client mounted with localflock), and then each machine
would get the lock. A claim needs no more than files: whoever cannot raise its count for a third of `lost_seconds` asks its run to
end, at two thirds kills it, and only after the whole of it does anybody else begin. Clocks are never compared; each side
counts its own seconds.
"""

import contextlib
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..files import read_json, write_json
from ..run_lock import LOCK, boot_id, describe_process, is_alive, is_locked, read_owner
from .job import Job

FOLDER, ORDER, CLAIM = ".jobs", "order.json", "claim.json"
LOST_SECONDS = 90.0
BEATS = 18  # in lost_seconds
TICK_SECONDS = 0.2
STOP, HURRY, REPLACED, SILENT, CUT_OFF, TAKEN = "stop", "hurry", "replaced", "silent", "cut off", "taken"


def find_folder(job: Job) -> Path:
    """Return where a job's order and claim stand; no run can have a name that begins with a dot."""
    return job.root / FOLDER / job.name


def order(job: Job, attempt: str, stop: int = 0) -> None:
    """Say which attempt is wanted; every other one of this run ends itself.

    `stop` counts how often the sweep asked it to: 1 saves, 2 ends at once. Raises RunError when it cannot be written.
    """
    try:
        write_json(find_folder(job) / ORDER, {"attempt": attempt, "stop": stop})
    except OSError as error:
        raise RunError(f"{find_folder(job)} cannot be written: {error.strerror}") from None


@dataclass
class Claim:
    """An attempt's side of the agreement."""

    job: Job
    attempt: str
    lost_seconds: float = LOST_SECONDS
    holder: str = field(default_factory=lambda: uuid.uuid4().hex)  # Slurm may start the same attempt a second time
    count: int = 0
    raised_at: float = 0.0  # monotonic seconds of the last time that the count could be raised
    looked_at: float = 0.0
    found: str | None = None
    follows_a_loss: bool = False  # the claim before this one was never given back

    def take(self, asked: Callable[[], bool] = lambda: False) -> str | None:
        """Wait until nobody else has the run, and claim it. Return None, or why it is not to run: STOP, HURRY or REPLACED.

        Raises RunError when this machine does not see the sweep's order.
        """
        folder = find_folder(self.job)
        if not (folder / ORDER).exists():
            raise RunError(
                f"{folder / ORDER} cannot be seen from {os.uname().nodename}: the run root has to stand on a file system "
                "that every machine of the cluster shares, under the same path."
            )
        seen, since = read_claim(folder), time.monotonic()
        while True:
            word = STOP if asked() else self.read_order()
            if word:
                return word
            now = read_claim(folder)
            if now and now.get("holder") == self.holder:  # nobody has written over it in the meantime
                return self.wait_for_lock(asked)
            if now != seen:
                seen, since = now, time.monotonic()
            silent = time.monotonic() - since > self.lost_seconds
            if silent or is_over(now):
                self.write_first(now or {}, silent)
            time.sleep(TICK_SECONDS)

    def write_first(self, before: dict[str, Any], silent: bool) -> None:
        """Write the claim for the first time."""
        if silent:
            forget_owner(self.job.root / self.job.name, before.get("process", {}))
        self.follows_a_loss = bool(before) and not before.get("ended")
        self.raised_at = time.monotonic()
        self.write()

    def wait_for_lock(self, asked: Callable[[], bool]) -> str | None:
        """Wait for what the machine before may still save; a lock that stays is left to the run itself to refuse."""
        until = time.monotonic() + self.lost_seconds
        while is_locked(self.job.root / self.job.name) and time.monotonic() < until:
            word = STOP if asked() else self.look()
            if word:
                self.release()
                return word
            time.sleep(TICK_SECONDS)
        return None

    def look(self) -> str | None:
        """Raise the count when it is time; return STOP, HURRY, REPLACED or SILENT (to end), CUT_OFF or TAKEN (to kill), or None."""
        now = time.monotonic()
        if now - self.looked_at >= self.lost_seconds / BEATS:
            self.looked_at = now
            self.found = self.find_word()
        return self.found

    def find_word(self) -> str | None:
        """Raise the count, and return what `look` does."""
        ours = self.is_ours()
        if ours is False:  # somebody else began because this machine was silent, while it was asleep for instance
            return TAKEN
        if ours and self.write():
            self.raised_at = time.monotonic()
        silent = time.monotonic() - self.raised_at
        if silent > self.lost_seconds / 3:
            return CUT_OFF if silent > self.lost_seconds * 2 / 3 else SILENT
        return self.read_order()

    def read_order(self) -> str | None:
        """Return STOP, HURRY or REPLACED when the sweep says so; an order that cannot be read just now says nothing."""
        try:
            given = read_json(find_folder(self.job) / ORDER)
        except RunError:
            return None
        if given.get("attempt") != self.attempt:
            return REPLACED
        stop = given.get("stop", 0)
        return HURRY if stop > 1 else STOP if stop else None

    def is_ours(self) -> bool | None:
        """Say whose claim stands in the file; None when it cannot be read just now."""
        with contextlib.suppress(RunError):
            return read_json(find_folder(self.job) / CLAIM).get("holder") == self.holder
        return None

    def write(self, **more: Any) -> bool:
        """Write the claim with the next count; say whether that was possible."""
        self.count += 1
        told = {"attempt": self.attempt, "holder": self.holder, "count": self.count, "process": describe_process()}
        try:
            write_json(find_folder(self.job) / CLAIM, told | more)
        except OSError:
            return False
        return True

    def release(self) -> None:
        """Say that the run is free, unless somebody else has it by now."""
        if self.is_ours():
            self.write(ended=True)


def read_claim(folder: Path) -> dict[str, Any] | None:
    """Return the claim that stands there; empty when there is none, None when it cannot be read just now."""
    if not (folder / CLAIM).exists():
        return {}
    try:
        return read_json(folder / CLAIM)
    except RunError:
        return None


def is_over(claim: dict[str, Any] | None) -> bool:
    """Say whether a claim binds nobody any more: none, given back, or of a process of this machine that has ended.

    A machine is this one only with the same time since its start: others may have been given the same name.
    """
    if not claim or claim.get("ended"):
        return claim is not None
    process = claim.get("process", {})
    return process.get("boot") == boot_id() and not is_alive(process)


def forget_owner(run: Path, process: dict[str, Any]) -> None:
    """Empty a run's lock file that a lost machine has left behind; where flock works it is the lock, not what the file says."""
    with contextlib.suppress(OSError), open(run / LOCK, "r+", encoding="utf-8") as file:
        if read_owner(file).get("machine") == process.get("machine"):
            file.truncate(0)
