"""The training's side of trackers: values are written into a pipe and never waited for.

The pipe is the queue and its size the bound: a tracker that does not read fills it, one that raised has closed it, and either
is dropped with one line in the log. Nothing of a tracker runs in the training's process.
"""

import atexit
import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from transformers import TrainerCallback

from ..files import finite
from ..run_folder import Run
from ..scrub import SECRET_NAME, remove_tokens, scrub

QUEUE_BYTES = 1 << 20  # some thousand steps; Linux's usual limit for a pipe
END_SECONDS = 1.0  # for all trackers together: at the end of a training, and once more at the end of the process
KEPT = "logs/metrics.jsonl holds every value."


class Tracker:
    """One tracker's process; `dropped` says why it is no longer told anything."""

    def __init__(self, name: str, run: Run, start: dict[str, Any]):
        """Start it; what it prints goes to logs/<name>.log, its files to logs/<name>/."""
        label = name.replace(":", ".")
        self.name, self.dropped = name, ""
        self.printed = run.path / "logs" / f"{label}.log"
        self.printed.parent.mkdir(parents=True, exist_ok=True)
        with open(self.printed, "wb") as printed:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "forgekit.train.trackers", name],
                stdin=subprocess.PIPE,
                stdout=printed,
                stderr=printed,
                env=make_environment(),
            )
        assert self.process.stdin is not None
        self.pipe = self.process.stdin
        os.set_blocking(self.pipe.fileno(), False)
        with contextlib.suppress(OSError):  # a user's limit; 64 KiB are still some hundred steps
            fcntl.fcntl(self.pipe, fcntl.F_SETPIPE_SZ, QUEUE_BYTES)
        self.send({"start": {**start, "folder": str(run.path / "logs" / label)}})

    def send(self, message: dict[str, Any]) -> None:
        """Write a line without waiting; when that is not possible, drop the tracker."""
        line = json.dumps(message).encode() + b"\n"
        try:
            if os.write(self.pipe.fileno(), line) == len(line):
                return
            self.drop("it has fallen behind")  # half a line went in
        except BlockingIOError:
            self.drop("it has fallen behind")
        except OSError:  # it has closed its end
            self.drop(f"it ended: {self.last_words()}")

    def drop(self, reason: str) -> None:
        """End the process and note why."""
        self.dropped = reason
        self.kill()
        self.pipe.close()

    def kill(self) -> None:
        """End the process; one that hangs in the kernel, on a network file system for instance, is left to the system."""
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)

    def last_words(self) -> str:
        """Return the last line that the process printed: the error, where it raised."""
        lines = self.printed.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return remove_tokens(lines[-1][:300]) if lines else "without a word"

    def end(self) -> None:
        """Tell it that nothing more comes."""
        if not self.dropped and not self.pipe.closed:
            self.send({"end": True})
            with contextlib.suppress(OSError):
                self.pipe.close()

    def has_ended(self) -> bool:
        """Say whether the process is gone; note a failure that came after its last value."""
        code = self.process.poll()
        if code and not self.dropped:
            self.dropped = f"it ended: {self.last_words()}"
        return code is not None


def make_environment() -> dict[str, str]:
    """Return a tracker's variables: no secret, no GPU, no address to send to, and this process's modules."""
    kept = {name: value for name, value in os.environ.items() if not SECRET_NAME.search(name)}
    kept = {name: value for name, value in kept.items() if not name.startswith("TRACKIO_")}
    path = os.pathsep.join(name for name in sys.path if name)
    return kept | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


class Tracking(TrainerCallback):
    """Tells each tracker of `train.report_to` what is logged; a training neither waits for one nor fails with it."""

    def __init__(self, names: Sequence[str], run: Run, settings: dict[str, Any], say: Callable[[str], None] = print):
        self.names, self.run, self.say = names, run, say
        self.settings = {name: clean(value) for name, value in settings.items()}
        self.trackers: list[Tracker] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the trackers."""
        self.close()
        if not state.is_world_process_zero:
            return
        start = {"run": self.run.path.name, "settings": self.settings, "step": state.global_step}
        for name in self.names:
            try:
                self.trackers.append(Tracker(name, self.run, start))
            except OSError as error:  # no more processes, or a full disk
                self.say(f"tracker {name} does not start: {error.strerror}. {KEPT}")
        atexit.register(self.kill)
        self.report()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Hand the values on: numbers as they are, words without tokens, NaN and infinity left out."""
        values = {clean(name): clean(value) for name, value in finite(logs or {}).items() if value is not None}
        for tracker in self.trackers:
            tracker.send({"step": state.global_step, "time": time.time(), "values": values})
        self.report()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the trackers end."""
        self.close()

    def fail(self, error: BaseException) -> None:
        """Let the trackers end; transformers calls no callback after an error."""
        self.close()

    def close(self) -> None:
        """Ask all to end and wait a moment; one that is not ready may go on beside what follows the training."""
        for tracker in self.trackers:
            tracker.end()
        self.wait()
        for tracker in self.trackers:
            if not tracker.dropped and not tracker.has_ended():
                self.say(f"tracker {tracker.name} is still writing and may do so until this process ends. {KEPT}")
        self.report()

    def wait(self) -> None:
        """Wait until all have ended, at most END_SECONDS."""
        until = time.monotonic() + END_SECONDS
        while time.monotonic() < until and not all(tracker.has_ended() for tracker in self.trackers):
            time.sleep(0.02)

    def report(self) -> None:
        """Say which trackers were dropped, and forget them and those that are done."""
        for tracker in self.trackers:
            if tracker.dropped:
                self.say(f"tracker {tracker.name} is dropped, because {tracker.dropped.rstrip('.')}. {KEPT}")
        self.trackers = [tracker for tracker in self.trackers if not tracker.dropped and tracker.process.poll() is None]

    def kill(self) -> None:
        """End what is left when this process ends."""
        for tracker in self.trackers:
            tracker.end()
        self.wait()
        for tracker in self.trackers:
            tracker.kill()


def clean(value: Any) -> Any:
    """Return a value without tokens and home folders; what is neither number nor text becomes text."""
    return float(value) if isinstance(value, Real) else scrub(str(value))
