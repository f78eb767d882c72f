"""One process writes a run's folder at a time: flock where the file system has it, else who stands in the lock file.

The lock file names its owner by process number, the time that process started, boot id and machine: after a restart of
the machine, or of a container, the same number may belong to somebody else.
"""

import json
import os
import platform
import time
from pathlib import Path
from typing import IO, Any

from .errors import RunNameError

LOCK = ".lock"
LOOK_SECONDS = 0.3  # longer than `is_locked` has a lock


def lock_folder(path: Path) -> IO[str]:
    """Lock a run's folder for this process; the system frees the lock when the process ends, however it ends.

    A child that inherits the file keeps the lock after its parent was killed. The lock of a dead owner is taken over.

    Raises RunNameError naming the owner when the folder is in use; nothing has been changed then.
    """
    file = open(path / LOCK, "a+", encoding="utf-8")  # noqa: SIM115  # open as long as the run
    try:
        take_lock(file)
    except BlockingIOError:
        owner = read_owner(file)
        file.close()
        raise RunNameError(describe_use(path, owner)) from None
    except (ImportError, OSError):  # Windows, and network file systems without flock: the file's words alone protect
        owner = read_owner(file)
        if is_alive(owner):
            file.close()
            raise RunNameError(describe_use(path, owner)) from None
    file.truncate(0)
    file.write(json.dumps(describe_process()))
    file.flush()
    return file


def take_lock(file: IO[str]) -> None:
    """Take flock, or raise BlockingIOError; one that nobody alive has signed may be somebody's look (`is_locked`), and is waited for."""
    import fcntl

    until = time.monotonic() + LOOK_SECONDS
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if is_alive(read_owner(file)) or time.monotonic() > until:
                raise
        time.sleep(LOOK_SECONDS / 10)


def is_locked(path: Path) -> bool:
    """Say whether a process has a run's folder; nothing is written there, and the lock is had for a moment."""
    try:
        with open(path / LOCK, "r+", encoding="utf-8") as file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except (ImportError, OSError):
                return is_alive(read_owner(file))
    except OSError:  # no lock, or no folder
        return False
    return False


def describe_process(pid: int | None = None) -> dict[str, Any]:
    """Return what tells a process of this machine, this one if none is named, from every other one."""
    pid = os.getpid() if pid is None else pid
    return {"pid": pid, "started": start_time(pid), "boot": boot_id(), "machine": platform.node()}


def read_owner(file: IO[str]) -> dict[str, Any]:
    """Return whom the lock file names; empty when nobody, or when it is unreadable."""
    file.seek(0)
    try:
        owner = json.loads(file.read())
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def is_alive(owner: dict[str, Any]) -> bool:
    """Say whether an owner may still write: on another machine that cannot be seen, so it is taken to be alive."""
    if not owner:
        return False
    if owner.get("machine") != platform.node():
        return True
    began = start_time(owner.get("pid", 0))
    # a minute's room: the start is counted from the boot, and moves when the clock is set
    return owner.get("boot") == boot_id() and began is not None and abs(began - owner.get("started", 0.0)) < 60


def describe_use(path: Path, owner: dict[str, Any]) -> str:
    """Return the sentence for a folder that somebody else has."""
    pid = owner.get("pid", "of an unknown number")
    if owner and not is_alive(owner):
        return f"{path} is in use: process {pid} is gone, but its kernel still saves there. Wait until it has ended."
    where = "" if owner.get("machine") in (None, platform.node()) else f" of {owner['machine']}"
    return f"{path} is in use by process {pid}{where}. Choose another run_name, or end that process first."


def start_time(pid: int) -> float | None:
    """Return when a process started, in seconds since 1970, or None when there is none of that number."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except (psutil.Error, ValueError):
        return None


def boot_id() -> str | None:
    """Return Linux's name for the time since the machine was started, or None elsewhere."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
