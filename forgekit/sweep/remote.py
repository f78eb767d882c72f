"""One attempt at a job on the machine of a cluster that was chosen for it: claim the run, start it, follow it, hand back its end.

stop from the sweep ────┐
SIGTERM, SIGINT here ───┼─> SIGTERM to `forgekit run` ─> checkpoint, exit code 143 ─> claim given back
a newer attempt ────────┤
shared folder is gone ──┘
this process dies ────────> the run sees its end of a pipe close, saves and ends by itself
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import RunError
from ..files import read_json
from ..run_folder import DONE
from ..runs.outcome import GATES_FAILED
from ..runs.session import find_package
from ..runs.supervise import PARENT, TWICE_SECONDS
from .claim import CUT_OFF, HURRY, LOST_SECONDS, STOP, TAKEN, TICK_SECONDS, Claim, find_folder
from .job import TERMINATED, End, Job

NOT_BEGUN = End(TERMINATED, "stopped before it began")


class Attempt:
    """One attempt; `run` blocks until it has ended."""

    def __init__(
        self, job: Job, attempt: str, command: Sequence[str] | None = None, lost_seconds: float = LOST_SECONDS
    ):
        """Take the job, the attempt's name in the sweep's order, and the command (None: this Python's `-m forgekit`)."""
        self.job = job
        self.command = tuple(command or (sys.executable, "-m", "forgekit"))
        self.claim = Claim(job, attempt, lost_seconds)
        self.signals: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT)
        self.heard: set[int] = set()
        self.told = 0  # how often the run has had SIGTERM, and when last (monotonic seconds)
        self.told_at = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def run(self) -> End:
        """Run the job here and return its end; code None when another attempt has the run."""
        try:
            with self.hear_signals():
                return self.claim_and_follow()
        except (OSError, RunError) as error:  # the folder or Python is missing on this machine
            return End(1, f"{os.uname().nodename}: {error}")

    def claim_and_follow(self) -> End:
        """Wait for the run, start it unless it has ended already, and wait for its end."""
        word = self.claim.take(lambda: bool(self.heard))
        if word:
            return NOT_BEGUN if word in (STOP, HURRY) else End(None, "a newer attempt has the run")
        try:
            done = find_end(self.job) if self.claim.follows_a_loss else None
            if done:
                return done
            self.start()
            return self.follow()
        finally:
            self.claim.release()

    def start(self) -> None:
        """Start `forgekit run` in a session of its own, so that it outlives this process for as long as it has to save."""
        log = self.job.log or find_folder(self.job) / "output.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        theirs, ours = os.pipe()  # `ours` stays open as long as this process lives
        try:
            with open(log, "ab") as output:
                self.process = subprocess.Popen(
                    [*self.command, *self.job.arguments],
                    cwd=self.job.folder,
                    env=make_environment(self.job) | {PARENT: str(theirs)},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(theirs,),
                    start_new_session=True,
                )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self.pipe = ours

    def follow(self) -> End:
        """Wait for the end of the run that was started, and look after it meanwhile."""
        assert self.process is not None
        while (code := self.process.poll()) is None:
            self.look_after(self.process)
            time.sleep(TICK_SECONDS)
        os.close(self.pipe)
        if self.claim.found == TAKEN:
            return End(None, "another machine has the run")
        return End(code) if code >= 0 else End(128 - code, f"ended by {signal.Signals(-code).name}")

    def look_after(self, process: subprocess.Popen[bytes]) -> None:
        """Raise the claim's count, and hand on what it says: SIGTERM, again in a hurry; a kill when somebody else may begin."""
        word = self.claim.look()
        if word in (CUT_OFF, TAKEN):
            kill_tree(process.pid)
        elif (word or self.heard) and not self.told or word == HURRY and self.told == 1 and self.is_apart():
            self.told += 1
            self.told_at = time.monotonic()
            process.terminate()

    def is_apart(self) -> bool:
        """Say whether a second SIGTERM would be taken for one; twice at once is what wrappers do with Ctrl-C."""
        return time.monotonic() - self.told_at > TWICE_SECONDS + 1

    @contextlib.contextmanager
    def hear_signals(self) -> Iterator[None]:
        """Let the signals ask for the end; only the main thread can hear them, elsewhere the sweep's order has to do."""

        def note(number: int, frame: Any) -> None:
            self.heard.add(number)

        wanted = self.signals if threading.current_thread() is threading.main_thread() else ()
        before = {number: signal.signal(number, note) for number in wanted}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)


def make_environment(job: Job) -> dict[str, str]:
    """Return the run's variables: this process's without Ray's, whose token is none of a notebook's business, and the job's."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    devices = {} if job.gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return own | find_package() | devices | job.environment


def find_end(job: Job) -> End | None:
    """Return the end that the attempt before reached although its machine was lost then, or None when there is work left."""
    try:
        record = read_json(job.root / job.name / "run.json")
    except RunError:
        return None
    # its gates have been judged; with any other state it is resumed
    if record.get("state") not in (DONE, GATES_FAILED):
        return None
    return End(record.get("exit_code"), "it had ended before its machine was lost")


def kill_tree(pid: int) -> None:
    """Kill a process and everything that it has started, kernels in groups of their own included."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
