"""The other processes of a training over several GPUs: started, watched and ended by the notebook's kernel, by process number.

kernel, rank 0 ─ socket pair ─> python -m forgekit.train.worker    rank 1, prints to logs/rank1.log
    │                               loads the model on a GPU of its own, says ready, trains, says done
    └ a thread listens: one that ends early ends all of them within moments, and the kernel's own wait for it
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .. import errors
from ..errors import ForgekitError, RunError
from ..run_folder import shorten_path
from .resume import is_out_of_memory

TICK_SECONDS = 0.2
NOTICE_SECONDS = 3.0  # from an error of ours that a lost neighbour may explain to the thread's knowing of it
BLAME_SECONDS = 20.0  # the same for an error that names a neighbour, which may still be freeing its memory
NEIGHBOUR = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
END_SECONDS = 30.0  # for a worker that has said done to be gone


class Workers:
    """The processes of ranks 1 and up. `failure` is the error that ended one of them, once there is one."""

    def __init__(self, log_folder: Path, lost: Callable[[], None]):
        """Take where their logs go, and what to call when one is lost."""
        self.log_folder, self.lost = log_folder, lost
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.lines: dict[int, Connection] = {}
        self.ready: dict[int, dict[str, Any]] = {}
        self.done: set[int] = set()
        self.failure: Exception | None = None
        self.changed, self.ending, self.judged = threading.Condition(), False, False
        self.thread = threading.Thread(target=self.listen, name="forgekit-workers", daemon=True)

    def start(self, jobs: dict[int, tuple[dict[str, Any], bytes]], cuda: bool) -> None:
        """Start a process for each rank, with a GPU of its own if `cuda`, and hand it its job.

        Args:
            jobs: rank -> what it needs before it can read the rest, and the rest.
        """
        self.log_folder.mkdir(parents=True, exist_ok=True)
        for rank, (first, rest) in jobs.items():
            mine, its = socket.socketpair()
            with mine, its, open(self.log_folder / f"rank{rank}.log", "ab") as log:
                self.processes[rank] = subprocess.Popen(
                    [sys.executable, "-m", "forgekit.train.worker", str(its.fileno())],
                    pass_fds=[its.fileno()], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    env=make_environment(rank, cuda),
                )  # fmt: skip
                self.lines[rank] = Connection(mine.detach())
            with suppress(OSError):  # it ended at once, and the thread will see that
                self.lines[rank].send_bytes(json.dumps(first).encode())
                self.lines[rank].send_bytes(rest)
        self.thread.start()

    def wait_until_ready(self, stopped: Callable[[], bool]) -> dict[int, dict[str, Any]]:
        """Return what each said when its model was loaded. Raises the error of one that failed, KeyboardInterrupt when asked to stop."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.failure or len(self.ready) == len(self.processes), TICK_SECONDS)
                if self.failure:
                    raise self.failure
                if len(self.ready) == len(self.processes):
                    return self.ready
            if stopped():
                raise KeyboardInterrupt

    def listen(self) -> None:
        """Take what they say until all are done, one is lost, or the kernel is done with them."""
        open_lines = dict(self.lines)
        while open_lines and not self.ending and self.failure is None:
            for line in wait(list(open_lines.values()), TICK_SECONDS):
                rank = next(rank for rank, mine in open_lines.items() if mine is line)
                try:
                    self.take(rank, json.loads(line.recv_bytes()))  # type: ignore[union-attr]
                except (EOFError, OSError):
                    del open_lines[rank]
                    if rank not in self.done and not self.ending:
                        self.fail(RunError(self.describe_end(rank)))
                        break

    def take(self, rank: int, message: dict[str, Any]) -> None:
        """Note one message: ready, done, or an error by its class and words."""
        if "error" in message:
            self.fail(rebuild_error(rank, message))
            return
        with self.changed:
            if "ready" in message:
                self.ready[rank] = message["ready"]
            if "done" in message:
                self.done.add(rank)
            self.changed.notify_all()

    def fail(self, error: Exception) -> None:
        """Note the first error and end everybody."""
        if self.failure is None:
            self.failure = error
            self.kill()
            self.lost()
        with self.changed:
            self.changed.notify_all()

    def describe_end(self, rank: int) -> str:
        """Return the sentence for a worker that ended without a word."""
        process = self.processes[rank]
        with suppress(subprocess.TimeoutExpired):
            process.wait(NOTICE_SECONDS)
        code = process.returncode
        how = f"ended with exit code {code}"
        if code is None:
            how = "closed its connection"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}" + (
                "; out of memory is the usual cause" if code == -signal.SIGKILL else ""
            )
        if rank not in self.ready:
            return (
                f"Process {process.pid}, which loaded the model as rank {rank} of {len(self.processes) + 1}, {how}, so no training "
                f"began. All of them load it at once: the machine's memory has to hold it so many times while they do. "
                f"Its log is {shorten_path(self.log_folder / f'rank{rank}.log')}."
            )
        return (
            f"Process {process.pid}, which trained as rank {rank} of {len(self.processes) + 1}, {how}, so training stopped. "
            f"Its log is {shorten_path(self.log_folder / f'rank{rank}.log')}; the newest checkpoint is whole, and the run resumes from it."
        )

    def explain(self, error: BaseException) -> BaseException:
        """Return the worker's error when the kernel's own is the mere consequence of it, else the kernel's own."""
        if isinstance(error, ForgekitError) or not isinstance(error, RuntimeError) or is_out_of_memory(error):
            return error
        blames = any(word in str(error) for word in NEIGHBOUR)
        with self.changed:
            self.changed.wait_for(lambda: self.failure, BLAME_SECONDS if blames else NOTICE_SECONDS)
        return self.failure or error

    @contextmanager
    def judge(self) -> Iterator[None]:
        """Find the cause of the block's error before the group is taken down, which the workers would report as theirs."""
        try:
            yield
        except BaseException as error:
            cause = self.explain(error)
            self.judged = True
            if cause is error:
                raise
            raise cause from None

    def finish(self) -> None:
        """Wait for processes that have said done."""
        deadline = time.monotonic() + END_SECONDS
        for process in self.processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))

    def kill(self) -> None:
        """End those that are left; they own nothing that could be lost."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()

    def close(self) -> None:
        """End everybody and the thread."""
        self.ending = True
        self.kill()
        for process in self.processes.values():
            process.wait()
        if self.thread.is_alive() and threading.current_thread() is not self.thread:
            self.thread.join()
        for line in self.lines.values():
            line.close()


@contextmanager
def open_workers(log_folder: Path, lost: Callable[[], None]) -> Iterator[Workers]:
    """Yield workers to start; none of them outlives the block, and an error of theirs is raised in place of what it caused here."""
    workers = Workers(log_folder, lost)
    try:
        yield workers
    except BaseException as error:
        cause = error if workers.judged else workers.explain(error)
        workers.close()
        if cause is error:
            raise
        raise cause from None
    workers.finish()
    workers.close()


def rebuild_error(rank: int, message: dict[str, Any]) -> Exception:
    """Return a worker's error as the kernel raises it: forgekit's own kinds and out of memory by their class, others as RunError."""
    kind, words = message["error"], message["words"]
    if kind == "OutOfMemoryError":
        import torch

        return torch.OutOfMemoryError(f"rank {rank}: {words}")
    own = getattr(errors, kind, None)
    if isinstance(own, type) and issubclass(own, ForgekitError):
        return own(f"rank {rank}: {words}")
    return RunError(f"Rank {rank} failed, so training stopped: {kind}: {words}")


def make_environment(rank: int, cuda: bool) -> dict[str, str]:
    """Return a worker's environment: this process's, this forgekit, and with `cuda` of the GPUs seen here the one of its rank."""
    import torch

    values = dict(os.environ)
    package = str(Path(__file__).absolute().parents[2])
    paths = [package, *filter(None, values.get("PYTHONPATH", "").split(os.pathsep))]
    values["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    if cuda:
        seen = values.get("CUDA_VISIBLE_DEVICES", "").strip()
        names = seen.split(",") if seen else [str(number) for number in range(torch.cuda.device_count())]
        values["CUDA_VISIBLE_DEVICES"] = names[rank].strip()
    return values
