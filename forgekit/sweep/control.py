"""A sweep from its first run to its last: which starts next, what its end means, and who is told.

source ──point──> waiting ──backend has room──> running ──> completed | gates_failed | refused
                     ^                              │
                     └── failed, crashed, machine lost: goes on from its last checkpoint, `retries` times
                                                    └──> pruned (weaker than others), stopped (with the sweep)
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .. import exit_codes
from ..errors import ConfigError, RunError
from ..files import write_json
from ..run_folder import DONE, now
from ..run_lock import is_locked
from ..runs.outcome import FAILED, GATES_FAILED, STOPPED
from ..runs.supervise import Supervisor
from ..scrub import scrub
from .board import Board
from .ends import find_kept, is_accident, name_end, read_ended, read_last_words
from .entry import ENDED, PRUNED, RECORD, REFUSED, RUNNING, WAITING, Entry, describe_runs
from .job import Backend, End, Job, stop_all
from .plan import Plan
from .results import write_results
from .source import Source
from .watch import Watch, read_if_there, read_score

LOSSES = 5  # machines that one run may lose; it is not the run's fault, but a run that kills machines has to end
TICK_SECONDS, LOOK_SECONDS = 0.2, 1.0
# between two tries of a backend that takes no run, and how many such tries there are while nothing runs
START_SECONDS, START_TRIES = 30.0, 5


@dataclass
class Control:
    """One call of `forgekit sweep`; `run` returns the exit code."""

    plan: Plan
    backend: Backend
    source: Source
    board: Board
    retries: int
    only_missing: bool
    has_gpu: bool
    entries: dict[str, Entry] = field(default_factory=dict)
    asked: Supervisor = field(default_factory=Supervisor)  # hears signals for this process as it does for a run
    before: dict[str, Any] = field(default_factory=dict)  # run -> what sweep.json said of it
    began: str = field(default_factory=now)
    hurried: bool = False
    looked: float = 0.0
    changed: bool = False  # a run has ended since the results were written
    unasked: list[str] = field(default_factory=list)  # runs that could not be told to stop, and are asked again
    refusals: int = 0  # starts that the backend could not make, one after the other
    start_at: float = 0.0  # no start before then (monotonic seconds)

    def run(self) -> int:
        """Run everything; SIGTERM, Ctrl-C and a hang-up stop all runs with checkpoints."""
        self.before = {run["name"]: run for run in read_if_there(self.plan.folder / RECORD).get("runs", [])}
        try:
            with self.asked.catch_signals():
                while self.go_on():
                    time.sleep(TICK_SECONDS)
        finally:
            self.backend.close()
            self.collect()
            for entry in self.find(RUNNING):  # this sweep broke off, and its backend waited for them
                entry.state = STOPPED
            self.save(over=True)
            self.compare()
        return self.exit_code()

    def go_on(self) -> bool:
        """Do what there is to do now; return whether there will be more."""
        self.collect()
        if self.asked.stop:
            self.stop_runs()
        else:
            self.start_all()
        if time.monotonic() - self.looked >= LOOK_SECONDS:
            self.look()
        busy = (RUNNING,) if self.asked.stop else (RUNNING, WAITING)
        more = any(entry.state in busy for entry in self.entries.values())
        return more or not self.asked.stop and self.source.left()

    # ---- starting ---------------------------------------------------------------------------------------------------

    def start_all(self) -> None:
        """Start runs as long as the backend has room."""
        while time.monotonic() >= self.start_at and self.backend.free() > 0:
            entry = self.next_entry()
            if entry is None:
                return
            try:
                job = self.plan.make_job(entry.point, self.has_gpu)
            except ConfigError as error:  # of a search the corners were checked, not every point that it may draw
                entry.reason = str(error)
                self.settle(entry, REFUSED)
                continue
            entry.last_step = self.plan.find_last_step(entry.point)
            self.start(entry, job)

    def start(self, entry: Entry, job: Job) -> None:
        """Start one run. A backend that cannot is asked again later; raises RunError when that does not help."""
        try:
            self.backend.start(job)
        except RunError as error:
            entry.refused += 1
            self.refusals += 1
            if self.refusals >= START_TRIES and not any(self.find(RUNNING)):
                raise
            self.start_at = time.monotonic() + START_SECONDS
            if entry.refused == 1:
                self.change(entry, WAITING, f"{error} It is tried again every {START_SECONDS:.0f} s.")
            return
        self.refusals = 0
        entry.attempts += 1
        self.change(entry, RUNNING)

    def next_entry(self) -> Entry | None:
        """Return the run to start next: one that waits and whose folder nobody has, else the source's next point.

        What the backend could not start comes last, so that it holds up nobody else, unless that goes for all.
        """
        waiting = sorted(self.find(WAITING), key=lambda entry: entry.refused)
        refused = [entry for entry in waiting if entry.refused]
        new = self.find_free([entry for entry in waiting if not entry.refused])
        if new is None and len(refused) < START_TRIES:
            new = self.take_point()
        return new or self.find_free(refused)

    def find_free(self, entries: list[Entry]) -> Entry | None:
        """Return the first whose folder no other process has; each is looked at once a second, which another may notice."""
        for entry in entries:
            if time.monotonic() - entry.probed < LOOK_SECONDS:
                continue
            entry.probed = time.monotonic()
            if not is_locked(entry.watch.folder):
                # meanwhile a run that was left over from another sweep may have come to its end
                ended = read_ended(entry.watch.folder, self.only_missing)
                if ended is None:
                    return entry
                self.settle(entry, ended)
        return None

    def take_point(self) -> Entry | None:
        """Return the source's next point that is to be run and whose folder nobody has."""
        while (point := self.source.take()) is not None:
            entry = self.entries[point.name] = Entry(point, Watch(self.plan.root / point.name))
            before = self.before.get(point.name, {}).get("state")
            kept = find_kept(entry.watch.folder, before, self.source.pruned(point.name), self.only_missing)
            if kept:
                self.keep(entry, kept)
            elif is_locked(entry.watch.folder):
                entry.probed = time.monotonic()
                self.board.say(f"{point.name}  waits: another process still has its folder")
            else:
                return entry
        return None

    def keep(self, entry: Entry, state: str) -> None:
        """Take a run's end over from before."""
        before = self.before.get(entry.point.name, {})
        entry.attempts, entry.reason = before.get("attempts", 0), before.get("reason")
        self.settle(entry, state, "kept" if state == DONE else "kept; --only-missing tries it again")

    # ---- ending -----------------------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Take the ends that the backend tells."""
        for name, end in self.backend.poll().items():
            self.take_end(self.entries[name], end)

    def take_end(self, entry: Entry, end: End) -> None:
        """Decide what an end means: over, or once more from the last checkpoint."""
        record = read_if_there(entry.watch.folder / "run.json")
        entry.reason = record.get("error") or end.reason
        told = {exit_codes.COMPLETED: DONE, exit_codes.USAGE: REFUSED, exit_codes.GATES_FAILED: GATES_FAILED}
        if end.code == exit_codes.USAGE and is_locked(entry.watch.folder):
            entry.attempts -= 1
            entry.probed = time.monotonic()
            self.change(entry, WAITING, "another process was faster, and has its folder")
        elif end.code in told:
            if end.code == exit_codes.USAGE:
                entry.reason = read_last_words(self.plan.find_log(entry.point))
            self.settle(entry, told[end.code])
        elif entry.weak:
            self.settle(entry, PRUNED)
        elif self.asked.stop:
            self.settle(entry, STOPPED)
        elif end.code is None and entry.losses < LOSSES:
            entry.losses += 1
            entry.attempts -= 1
            self.change(entry, WAITING, f"its machine was lost ({end.reason}); goes on elsewhere")
        elif entry.attempts <= self.retries and is_accident(end, record):
            self.change(entry, WAITING, f"{entry.reason or f'exit code {end.code}'}; goes on from its last checkpoint")
        else:
            entry.reason = entry.reason or read_last_words(self.plan.find_log(entry.point))
            self.settle(entry, name_end(end, record))

    def settle(self, entry: Entry, state: str, words: str | None = None) -> None:
        """Note a run's end and tell the source."""
        score = read_score(entry.watch.folder, self.plan.score) if state in ENDED else None
        if state != STOPPED:  # a stopped one goes on with the next call
            self.source.close(entry.point.name, score, state == PRUNED)
        self.changed = True
        told = [f"{self.plan.score} {score:.4g}"] if score is not None else []
        told += [words] if words else [entry.reason] if entry.reason else []
        self.change(entry, state, "; ".join(told))

    def stop_runs(self) -> None:
        """Ask every run to stop, once; a second signal asks again, which ends them at once."""
        hurry = self.asked.hurry and not self.hurried
        if self.asked.told and not hurry:
            return
        self.asked.told, self.hurried = True, self.asked.hurry
        running = list(self.find(RUNNING))
        assert self.asked.stop is not None
        self.board.say(f"{self.asked.stop.by}: {len(running)} running are asked to save and stop")
        self.ask([entry.point.name for entry in running])

    def ask(self, names: list[str]) -> None:
        """Ask runs to stop; those that cannot be told now are asked again a second later."""
        left = stop_all(names, self.backend.stop)
        for name in set(left) - set(self.unasked):
            self.board.say(f"{name}  cannot be told to stop now, and is asked again")
        self.unasked = [*(name for name in self.unasked if name not in names), *left]

    # ---- while they run ---------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Read how far each run is; end those that do worse than others did at the same step."""
        self.looked = time.monotonic()
        search = self.plan.sweep.search
        by = search.prune.by if search and search.prune else None
        self.ask([name for name in self.unasked if self.entries[name].state == RUNNING])
        for entry in self.find(RUNNING):
            entry.watch.read()
            curve = entry.watch.curves[by] if by else {}
            last = (entry.last_step or entry.watch.status().get("total_steps") or math.inf) if curve else 0
            # at the last step nothing is saved by ending it, and it would have no score
            for step in sorted(step for step in curve if entry.told < step < last):
                entry.told = step
                if not entry.weak and self.source.report(entry.point.name, step, curve[step]):
                    entry.weak = True
                    reason = f"{by} {curve[step]:.4f} is not among the best"
                    self.board.say(f"{entry.point.name}  is ended at step {step}: {reason}")
                    self.ask([entry.point.name])
        if self.changed:
            self.compare()
        self.board.draw(self.entries.values())

    def find(self, state: str) -> Iterator[Entry]:
        """Yield the runs in a state, in their order."""
        return iter([entry for entry in self.entries.values() if entry.state == state])

    # ---- telling ----------------------------------------------------------------------------------------------------

    def change(self, entry: Entry, state: str, words: str = "") -> None:
        """Note a run's new state, print it, and write the sweep's files."""
        entry.state = state
        attempt = f"attempt {entry.attempts}" if state == RUNNING and entry.attempts > 1 else ""
        self.board.say("  ".join(filter(None, (f"{entry.point.name}  {state}", attempt, words))))
        self.save()

    def save(self, over: bool = False) -> None:
        """Write sweep.json; a full disk is no reason to lose the sweep."""
        state = RUNNING if not over else STOPPED if self.asked.stop else DONE if self.is_complete() else FAILED
        times = {"started_at": self.began, "updated_at": now()}
        record = self.plan.describe() | {"state": state, **times, "runs": describe_runs(self.entries, self.before)}
        try:
            write_json(self.plan.folder / RECORD, record, scrub)
        except OSError as error:
            self.board.say(f"{RECORD} cannot be written: {error.strerror}")

    def compare(self) -> None:
        """Write results and figure anew."""
        self.changed = False
        try:
            write_results(self.plan.folder)
        except Exception as error:  # noqa: BLE001  # whatever it is: hours of runs must not end for a table
            self.board.say(f"the results cannot be written: {type(error).__name__}: {error}")

    def exit_code(self) -> int:
        """Return 0 when every run completed or was ended early, 128 + n after signal n, else 1."""
        if self.asked.stop and self.asked.stop.number:
            return 128 + self.asked.stop.number
        return 0 if self.is_complete() else 1

    def is_complete(self) -> bool:
        """Say whether every point was run to its end, or ended because others did better."""
        return not self.source.left() and all(entry.state in (DONE, PRUNED) for entry in self.entries.values())
