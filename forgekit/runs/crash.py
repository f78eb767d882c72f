"""Why a kernel died: its exit code, and whether the system took it for want of memory."""

import re
import subprocess
from pathlib import Path

from .outcome import CRASHED, Outcome, name_signal

CGROUPS = Path("/sys/fs/cgroup")
SIGKILL = 9


class MemoryKills:
    """Counts the processes that the system killed for want of memory in one process's cgroup, where that can be read."""

    def __init__(self, pid: int):
        self.pid = pid
        self.file = find_counter(pid)
        self.before = read_kills(self.file)

    def explain(self) -> str | None:
        """Return how it is known that the process was killed for want of memory, or None when it is not known."""
        after = read_kills(self.file)
        if None not in (self.before, after) and after > self.before:  # type: ignore[operator]
            return f"{self.file} counts a kill for want of memory"
        line = next((line for line in read_kernel_log() if re.search(rf"[Kk]illed process {self.pid}\b", line)), None)
        return line and f"the system's log says: {line.strip()}"


def find_counter(pid: int) -> Path | None:
    """Return the file that counts kills: memory.events of cgroup 2, memory.oom_control of cgroup 1, or None."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    groups = dict(line.split(":", 2)[1:] for line in lines if line.count(":") >= 2)
    # inside a container the path may be the host's, and the container's own group stands at the root
    places = [CGROUPS / groups.get("", "/").lstrip("/") / "memory.events", CGROUPS / "memory.events"]
    if "memory" in groups:
        own = CGROUPS / "memory"
        places += [own / groups["memory"].lstrip("/") / "memory.oom_control", own / "memory.oom_control"]
    return next((place for place in places if read_kills(place) is not None), None)


def read_kills(file: Path | None) -> int | None:
    """Return the number behind `oom_kill`, or None when the file cannot be read or does not say."""
    try:
        found = re.search(r"^oom_kill (\d+)$", file.read_text(encoding="utf-8"), re.MULTILINE) if file else None
    except OSError:
        return None
    return int(found.group(1)) if found else None


def read_kernel_log() -> list[str]:
    """Return the last lines of the system's log about kills, or nothing where this user may not read it."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=3, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines()[-500:] if done.returncode == 0 else []


def describe_crash(code: int | None, memory: MemoryKills | None) -> Outcome:
    """Return the outcome of a kernel that ended by itself with this exit code; negative ones are signals."""
    if code is None or code >= 0:
        ended = "ended" if code is None else f"ended with exit code {code}"
        return Outcome(CRASHED, f"the kernel {ended} while a cell was running; see logs/training.log")
    number = -code
    shortage = memory.explain() if memory and number == SIGKILL else None
    if shortage:
        return Outcome(CRASHED, f"the kernel was killed because memory ran out ({shortage})", number=number)
    hint = "; out of memory is the usual cause, and nothing readable here confirms it" if number == SIGKILL else ""
    return Outcome(CRASHED, f"the kernel was killed by {name_signal(number)}{hint}; see logs/training.log", number=number)
