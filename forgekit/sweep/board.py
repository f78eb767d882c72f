"""What a sweep prints: a line for each change; below it, on a terminal, a table that is written over and over."""

import shutil
import time
from collections import Counter
from collections.abc import Iterable
from typing import TextIO

from ..scrub import remove_tokens
from .entry import RUNNING, WAITING, Entry
from .watch import HELD_OUT_LOSS, LOSS

QUIET_SECONDS = 60.0  # between two lines about how far the runs are, where there is no table
UP, CLEAR = "\033[{}A", "\033[J"  # cursor up so many lines; forget what stands below


class Board:
    """Lines and table of one sweep on a stream."""

    def __init__(self, stream: TextIO):
        self.stream, self.live = stream, stream.isatty()
        self.table: list[str] = []
        self.told = time.monotonic()

    def say(self, line: str) -> None:
        """Print a line with the time."""
        self.wipe()
        self.print(f"{time.strftime('%H:%M:%S')}  {remove_tokens(line)}")
        self.show(self.table)

    def draw(self, entries: Iterable[Entry]) -> None:
        """Bring the table up to date; in a log, a line a minute says the same."""
        entries = list(entries)
        if self.live:
            self.wipe()
            self.show(write_table(entries, shutil.get_terminal_size()))
        elif time.monotonic() - self.told >= QUIET_SECONDS:
            self.told = time.monotonic()
            running = [
                f"{entry.point.name} {describe_progress(entry)}".rstrip() for entry in entries if entry.state == RUNNING
            ]
            self.say("; ".join([count_states(entries), *running]))

    def end(self) -> None:
        """Leave the table away."""
        self.wipe()
        self.table = []

    def wipe(self) -> None:
        """Take the table off the terminal."""
        if self.live and self.table:
            self.print(f"{UP.format(len(self.table))}{CLEAR}", end="")

    def show(self, table: list[str]) -> None:
        """Print the table and remember how high it is."""
        self.table = table
        if self.live and table:
            self.print("\n".join(table))

    def print(self, text: str, end: str = "\n") -> None:
        """Print; once nobody reads any more, do without."""
        try:
            print(text, end=end, file=self.stream, flush=True)
        except (OSError, ValueError):  # a terminal that hung up
            self.live = False


def write_table(entries: list[Entry], size: tuple[int, int]) -> list[str]:
    """Return a line a run that has begun, cut to the terminal: those that run first, then the newest ends."""
    columns, height = size[0], size[1]
    begun = [entry for entry in entries if entry.state != WAITING]
    begun.sort(key=lambda entry: entry.state != RUNNING)
    running = sum(entry.state == RUNNING for entry in begun)
    room = max(height - 4, 1)
    shown = begun[:running] + begun[running:][-max(room - running, 0) :] if len(begun) > room else begun
    width = max((len(entry.point.name) for entry in shown), default=0)
    lines = [f"{entry.point.name:<{width}}  {entry.state:<12}  {describe_progress(entry)}" for entry in shown[:room]]
    return [line[: columns - 1] for line in ["", count_states(entries), *lines]]


def count_states(entries: list[Entry]) -> str:
    """Return "2 running, 3 completed, 1 failed"."""
    return ", ".join(f"{number} {state}" for state, number in Counter(entry.state for entry in entries).most_common())


def describe_progress(entry: Entry) -> str:
    """Return step, losses and seconds left of a run, as far as they are known."""
    curves, status = entry.watch.curves, entry.watch.status() if entry.state == RUNNING else {}
    words = [f"step {status['step']}/{status['total_steps']}"] if status.get("total_steps") else []
    for name, curve in (("loss", curves[LOSS]), ("held-out loss", curves[HELD_OUT_LOSS])):
        words += [f"{name} {curve[max(curve)]:.4f}"] if curve else []
    if status.get("running") and status.get("eta_seconds"):
        words.append(f"{status['eta_seconds']:.0f} s left")
    return "  ".join(words)
