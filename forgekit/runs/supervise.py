"""Watches a notebook's kernel: asks it to stop when a signal, the time limit or a hung step says so, and ends it in time.

    signal to this process ─┐
    --timeout ──────────────┼─> ask ─> "stop" to the kernel ─> step ends, checkpoint, cell returns ─> kernel shut down
    a step that hangs ──────┤                       └── not within the grace period: the kernel is killed
    a sweep that is gone ───┘

A thread of its own does the watching, so that it goes on whatever the notebook's messages do.
"""

import contextlib
import json
import os
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from .outcome import name_signal

GRACE_SECONDS = 30.0  # the least; two median steps where those are longer
HANG_SECONDS, HANG_STEPS = 600.0, 20  # a step hangs after the longer of ten minutes and twenty median steps
TICK_SECONDS = 0.2
HUNG = "its supervisor"  # who stopped a run whose step hung
PARENT = "FORGEKIT_PARENT"  # number of an open file whose other end the process that started this one holds
TWICE_SECONDS = 2.0  # a second signal ends the run at once, but Ctrl-C may arrive twice through a wrapper


@dataclass(frozen=True)
class Stop:
    """Who asked the run to stop, by which signal if by one, and when (monotonic seconds)."""

    by: str
    number: int | None
    at: float


class Supervisor:
    """One supervised execution. `stop` is set once somebody has asked for the end."""

    def __init__(self, grace: float | None = None, timeout: float | None = None):
        """Take the grace period and the time limit in seconds; None: the default grace, no limit."""
        self.grace, self.timeout = grace, timeout
        self.stop: Stop | None = None
        self.killed: str | None = None  # why this supervisor had to kill the kernel
        self.began = time.monotonic()
        self.pid: int | None = None
        self.listens = False  # our extension runs in the kernel
        self.executing = False  # a kernel that still starts would die of an interrupt
        self.link: socket.socket | None = None
        self.parent: int | None = None  # a file that ends when the process that started this one does
        self.told = self.hurry = False
        self.step_began: float | None = None
        self.seconds: deque[float] = deque(maxlen=1000)
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None
        self.rest = b""

    # ---- asked from outside -----------------------------------------------------------------------------------------

    def ask(self, by: str, number: int | None = None) -> None:
        """Ask for the end; the first who asks is remembered."""
        if self.stop is None:
            self.stop = Stop(by, number, time.monotonic())

    @contextlib.contextmanager
    def catch_signals(self) -> Iterator[None]:
        """Make SIGTERM, SIGINT and SIGHUP ask for the end; a second one ends the kernel at once.

        One that is ignored already (`nohup`) stays ignored. Only the main thread may set handlers; elsewhere nothing is caught.
        """

        def note(number: int, frame: Any) -> None:
            if self.stop and time.monotonic() - self.stop.at > TWICE_SECONDS:
                self.hurry = True
            self.ask(name_signal(number), number)

        before = {}
        if threading.current_thread() is threading.main_thread():
            wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
            before = {number: signal.getsignal(number) for number in wanted}
            before = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    def follow_parent(self) -> None:
        """Ask for the end once the process that started this one, for instance a sweep, is gone; without one do nothing.

        It says so by a variable, which is this process's alone: a kernel does not have the file.
        """
        number = os.environ.pop(PARENT, None)
        if number is not None:
            self.parent = int(number)
            os.set_inheritable(self.parent, False)

    # ---- the kernel -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watch(self, link: socket.socket) -> Iterator[None]:
        """Watch a kernel, `pid` once it is set, while the block runs, and leave none of its processes behind."""
        self.link, self.pid, self.step_began, self.rest = link, None, None, b""
        self.listens = self.executing = False
        self.ended.clear()
        self.thread = threading.Thread(target=self.run, name="forgekit-supervisor", daemon=True)
        self.thread.start()
        try:
            yield
        finally:
            self.ended.set()
            self.thread.join()
            if self.pid is not None:
                kill_group(self.pid)

    def cell_begins(self) -> None:
        """Note that there is something to interrupt."""
        self.executing = True

    def cell_ended(self) -> None:
        """Forget a step that an error cut short."""
        self.step_began = None

    def run(self) -> None:
        """Look at everything a few times a second, until the block of `watch` has ended."""
        while not self.ended.is_set():
            self.read_events()
            self.check_limits()
            if self.stop:
                self.see_to_the_end(self.stop)

    def read_events(self) -> None:
        """Take what the kernel says, for at most one tick."""
        assert self.link is not None
        listened: list[socket.socket | int] = [self.link]
        listened += [] if self.parent is None else [self.parent]
        ready, _, _ = select.select(listened, [], [], TICK_SECONDS)
        if self.parent in ready:  # nothing is ever written there
            self.parent = None
            self.ask("the death of the process that started it")
        received = b""
        with contextlib.suppress(ConnectionError):  # it died with words of ours unread
            received = self.link.recv(65536) if self.link in ready else b""
        if (
            self.link in ready and not received
        ):  # the kernel has closed its end; the notebook's client finds out by itself
            self.ended.wait(TICK_SECONDS)
        *lines, self.rest = (self.rest + received).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):
                self.take(json.loads(line))

    def take(self, event: dict[str, Any]) -> None:
        """Note one event, as `forgekit.link` lists them."""
        if "step" in event:
            self.step_began = time.monotonic()
        elif "done" in event:
            self.step_began = None
            self.seconds.append(event["seconds"])
        elif "rest" in event:
            self.step_began = None
        elif "stop" in event:
            self.ask(f"{name_signal(event['stop'])} to its kernel", event["stop"])
        elif "ready" in event:
            self.listens = True

    def check_limits(self) -> None:
        """Ask for the end when the time limit has passed or a step hangs, then with every thread's stack in the log."""
        now = time.monotonic()
        if self.stop is None and self.timeout is not None and now - self.began > self.timeout:
            self.ask(f"its time limit of {self.timeout:g} s")
        if self.stop is None and self.step_began is not None and now - self.step_began > self.hang_limit():
            if self.listens:
                self.signal_kernel(signal.SIGUSR1)
            self.ask(
                f"{HUNG}: step {len(self.seconds) + 1} since the start hung for {now - self.step_began:.0f} s, "
                "the stacks stand in logs/training.log"
            )

    def hang_limit(self) -> float:
        """Return after how many seconds a step hangs."""
        return max(HANG_SECONDS, HANG_STEPS * median(self.seconds)) if self.seconds else HANG_SECONDS

    def grace_seconds(self) -> float:
        """Return the seconds from being asked to having ended."""
        if self.grace is not None:
            return self.grace
        return max(GRACE_SECONDS, 2 * median(self.seconds)) if self.seconds else GRACE_SECONDS

    def see_to_the_end(self, stop: Stop) -> None:
        """Tell the kernel once; kill it when the grace period is nearly over, so that the notebook is written within it."""
        if not self.told and self.executing:
            self.told = True
            if self.listens and self.link is not None:
                with contextlib.suppress(OSError):
                    self.link.sendall(b'{"stop": true}\n')
            else:
                self.signal_kernel(signal.SIGINT)
        grace = self.grace_seconds()
        late = time.monotonic() - stop.at > grace - min(3.0, grace / 4)
        if (late or self.hurry) and self.killed is None and self.pid is not None:
            why = "a second signal came" if self.hurry else f"it did not end within the grace period of {grace:.0f} s"
            self.killed = f"the kernel was killed because {why}"
            kill_group(self.pid)

    def signal_kernel(self, number: int) -> None:
        """Send a signal to the kernel alone: its workers would die of it and take the step with them."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def kill_group(pid: int) -> None:
    """Kill a kernel and everything it started; it leads a process group of its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
