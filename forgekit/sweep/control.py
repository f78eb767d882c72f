"""A sweep from its first run to its last: which starts next, what its end means, and who is told.

source ──point──> waiting ──backend has room──> running ──> completed | gates_failed | refused
                     ^                              │
                     └── failed, crashed, machine lost: goes on from its last checkpoint, `retries` times
                                                    └──> pruned (weaker than others), stopped (with the sweep)
"""

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..files import write_json
from ..run_folder import DONE, now
from ..run_lock import is_locked
from ..runs.outcome import CRASHED, FAILED, GATES_FAILED, STOPPED
from ..runs.supervise import HUNG, Supervisor
from ..scrub import scrub
from .board import Board
from .entry import FINAL, LOST, PRUNED, RECORD, REFUSED, RUNNING, WAITING, Entry
from .job import Backend, End
from .plan import Plan, read_state
from .results import write_results
from .source import Source
from .watch import Watch, read_if_there, read_score

USAGE_CODE, GATES_CODE = 2, 3
KILLED = 128 + signal.SIGKILL
LOSSES = 5  # machines that one run may lose; it is not the run's fault, but a run that kills machines has to end
TICK_SECONDS, LOOK_SECONDS = 0.2, 1.0


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
            self.stop_all()
        else:
            self.start_all()
        if time.monotonic() - self.looked >= LOOK_SECONDS:
            self.look()
        busy = (RUNNING,) if self.asked.stop else (RUNNING, WAITING)
        return any(entry.state in busy for entry in self.entries.values())

    # ---- starting ---------------------------------------------------------------------------------------------------

    def start_all(self) -> None:
        """Start runs as long as the backend has room."""
        while self.backend.free() > 0:
            entry = self.next_entry()
            if entry is None:
                return
            entry.attempts += 1
            self.change(entry, RUNNING)
            self.backend.start(self.plan.make_job(entry.point, self.has_gpu))

    def next_entry(self) -> Entry | None:
        """Return the run to start next: one that waits and whose folder nobody has, else the source's next point."""
        for entry in self.find(WAITING):
            if not is_locked(entry.watch.folder):
                # meanwhile a run that was left over from another sweep may have come to its end
                if read_state(entry.watch.folder) != DONE:
                    return entry
                self.settle(entry, DONE)
        while (point := self.source.take()) is not None:
            entry = self.entries[point.name] = Entry(point, Watch(self.plan.root / point.name))
            kept = self.find_kept(entry)
            if kept:
                self.keep(entry, kept)
            elif is_locked(entry.watch.folder):
                self.board.say(f"{point.name}  waits: another process still has its folder")
            else:
                return entry
        return None

    def find_kept(self, entry: Entry) -> str | None:
        """Return the state of a run that needs nothing more, or None."""
        name = entry.point.name
        if read_state(entry.watch.folder) == DONE:
            return DONE
        if self.source.pruned(name):
            return PRUNED
        state = self.before.get(name, {}).get("state")
        return state if state in FINAL and state not in (DONE, PRUNED) and not self.only_missing else None

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
        told = {0: DONE, USAGE_CODE: REFUSED, GATES_CODE: GATES_FAILED}
        if end.code in told:
            if end.code == USAGE_CODE:
                entry.reason = self.read_last_words(entry)
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
            known = next((state for state in (STOPPED, CRASHED) if state == record.get("state")), FAILED)
            entry.reason = entry.reason or self.read_last_words(entry)
            self.settle(entry, LOST if end.code is None else known)

    def read_last_words(self, entry: Entry) -> str | None:
        """Return the last line that a run printed."""
        job = self.plan.make_job(entry.point, self.has_gpu)
        try:
            lines = job.log.read_text(encoding="utf-8", errors="replace").split("\n") if job.log else []
        except OSError:
            return None
        return next((line.strip() for line in reversed(lines) if line.strip()), None)

    def settle(self, entry: Entry, state: str, words: str | None = None) -> None:
        """Note a run's end and tell the source."""
        scored = state in (DONE, GATES_FAILED)
        score = read_score(entry.watch.folder, self.plan.score) if scored else None
        if state != STOPPED:  # a stopped one goes on with the next call
            self.source.close(entry.point.name, score, state == PRUNED)
        self.changed = True
        told = [f"{self.plan.score} {score:.4g}"] if score is not None else []
        told += [words] if words else [entry.reason] if entry.reason else []
        self.change(entry, state, "; ".join(told))

    def stop_all(self) -> None:
        """Ask every run to stop, once; a second signal asks again, which ends them at once."""
        hurry = self.asked.hurry and not self.hurried
        if self.asked.told and not hurry:
            return
        self.asked.told, self.hurried = True, self.asked.hurry
        running = list(self.find(RUNNING))
        assert self.asked.stop is not None
        self.board.say(f"{self.asked.stop.by}: {len(running)} running are asked to save and stop")
        for entry in running:
            self.backend.stop(entry.point.name)

    # ---- while they run ---------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Read how far each run is; end those that do worse than others did at the same step."""
        self.looked = time.monotonic()
        search = self.plan.sweep.search
        by = search.prune.by if search and search.prune else None
        for entry in self.find(RUNNING):
            entry.watch.read()
            curve = entry.watch.curves[by] if by else {}
            for step in sorted(step for step in curve if step > entry.told):
                entry.told = step
                if not entry.weak and self.source.report(entry.point.name, step, curve[step]):
                    entry.weak = True
                    self.board.say(
                        f"{entry.point.name}  is ended at step {step}: {by} {curve[step]:.4f} is not among the best"
                    )
                    self.backend.stop(entry.point.name)
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
        states = [entry.state for entry in self.entries.values()]
        ended = DONE if all(state in (DONE, PRUNED) for state in states) else FAILED
        record = self.plan.describe() | {
            "state": RUNNING if not over else STOPPED if self.asked.stop else ended,
            "started_at": self.began,
            "updated_at": now(),
            "runs": [entry.describe() for entry in self.entries.values()],
        }
        try:
            write_json(self.plan.folder / RECORD, record, scrub)
        except OSError as error:
            self.board.say(f"{RECORD} cannot be written: {error.strerror}")

    def compare(self) -> None:
        """Write results and figure anew."""
        self.changed = False
        try:
            write_results(self.plan.folder)
        except OSError as error:
            self.board.say(f"the results cannot be written: {error.strerror}")

    def exit_code(self) -> int:
        """Return 0 when every run completed or was ended early, 128 + n after signal n, else 1."""
        if self.asked.stop and self.asked.stop.number:
            return 128 + self.asked.stop.number
        return 0 if all(entry.state in (DONE, PRUNED) for entry in self.entries.values()) else 1


def is_accident(end: End, record: dict[str, Any]) -> bool:
    """Say whether a run may go on: it failed, crashed, hung, or its process was killed, and nobody asked it to stop."""
    if end.code is None:
        return False
    hung = str(record.get("stopped_by", "")).startswith(HUNG)
    return record.get("state") != STOPPED or hung or end.code == KILLED
