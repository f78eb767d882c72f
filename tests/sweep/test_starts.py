"""What a sweep does when a run cannot be started, when somebody else is faster, and when it breaks off in the middle."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forgekit.errors import RunError
from forgekit.run_lock import lock_folder
from forgekit.sweep.ends import is_accident
from forgekit.sweep.job import End, Job, stop_all
from forgekit.sweep.local import Local
from forgekit.sweep.ray import Ray

from .conftest import FAKE, NAMES, read_record, read_started, read_states
from .test_control import BEST, HIGH, LOW, wait_for

pytestmark = pytest.mark.usefixtures("own_folder")

Sweep = Callable[..., int]
DONE = "completed"


def use(monkeypatch: pytest.MonkeyPatch, start: Callable[[Local, Job], None]) -> None:
    """Let the backend start runs by this function; `Local.start` is what it may call."""
    backend = type("Stub", (Local,), {"start": start})
    monkeypatch.setattr("forgekit.sweep.local.Local", lambda slots, gpus: backend(slots, gpus, FAKE))


# ---- starts that fail ------------------------------------------------------------------------------------------------


def test_a_start_that_fails_is_tried_again_behind_the_others_and_told_once(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("forgekit.sweep.control.START_SECONDS", 0.05)
    left = [NAMES[0]] * 3

    def start(self: Local, job: Job) -> None:
        if job.name in left:
            left.remove(job.name)
            raise RunError("Slurm does not take it.")
        Local.start(self, job)

    use(monkeypatch, start)
    assert sweep() == 0
    assert read_started() == [NAMES[1], NAMES[2], NAMES[0]] and not left
    assert capsys.readouterr().out.count("Slurm does not take it. It is tried again every") == 1
    assert {run["attempts"] for run in read_record()["runs"]} == {1}


def test_a_backend_that_never_starts_anything_ends_the_sweep_and_it_is_not_complete(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forgekit.sweep.control.START_SECONDS", 0.01)

    def refuse(self: Local, job: Job) -> None:
        raise RunError("no node has 5 GPUs")

    use(monkeypatch, refuse)
    with pytest.raises(RunError, match="no node has 5 GPUs"):
        sweep()
    assert read_record()["state"] == "failed" and set(read_states().values()) == {"waiting"}


def test_a_sweep_that_breaks_off_after_a_completed_run_is_not_completed(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaking(Local):
        def free(self) -> int:
            if not self.running and Path("runs", NAMES[0]).exists():
                raise MemoryError
            return super().free()

    monkeypatch.setattr("forgekit.sweep.local.Local", lambda slots, gpus: Breaking(slots, gpus, FAKE))
    with pytest.raises(MemoryError):
        sweep()
    assert read_states() == {LOW: DONE} and read_record()["state"] == "failed"


def test_a_backend_without_room_for_a_moment_does_not_end_the_sweep(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []

    class Full(Local):
        def free(self) -> int:
            looks.append(1)
            return 0 if len(looks) < 5 else super().free()

    monkeypatch.setattr("forgekit.sweep.local.Local", lambda slots, gpus: Full(slots, gpus, FAKE))
    assert sweep() == 0
    assert read_started() == NAMES


def test_ray_lets_one_start_while_nothing_runs_so_that_its_refusal_is_heard() -> None:
    ray = Ray.__new__(Ray)
    ray.slots, ray.cpus, ray.gpus, ray.running = None, 1, 2, {}
    ray.nodes = lambda: [{"CPU": 8, "GPU": 1}]  # type: ignore[method-assign]
    assert ray.free() == 1
    ray.known = []
    job = Job("wide", Path(), (), Path(), gpus=2)
    with pytest.raises(RunError, match="run wide needs 1 CPU cores and 2 GPUs of one node"):
        ray.start(job)
    ray.running = {"wide": (job, "", None)}
    assert ray.free() == 0


# ---- stops that fail -------------------------------------------------------------------------------------------------


def test_a_stop_that_cannot_be_told_is_told_again(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("forgekit.sweep.control.LOOK_SECONDS", 0.1)
    asked: list[str] = []

    class Deaf(Local):
        def stop(self, name: str) -> None:
            asked.append(name)
            if len(asked) < 3:
                raise RunError("no space left on device")
            super().stop(name)

    monkeypatch.setattr("forgekit.sweep.local.Local", lambda slots, gpus: Deaf(slots, gpus, FAKE))
    begun = Path("runs", NAMES[0], "status.json")
    stopper = threading.Thread(target=lambda: (wait_for(begun.exists), os.kill(os.getpid(), signal.SIGTERM)))
    stopper.start()
    assert sweep({NAMES[0]: ["wait"]}) == 143
    stopper.join()
    assert asked == [NAMES[0]] * 3 and read_states() == {LOW: "stopped"}
    assert capsys.readouterr().out.count("cannot be told to stop now, and is asked again") == 1


def test_those_that_could_not_be_told_are_returned() -> None:
    def stop(name: str) -> None:
        if name == "b":
            raise RunError("full")

    assert stop_all("abc", stop) == ["b"]


# ---- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "record", "accident"),
    [
        (143, {}, False),  # scancel by a person, or SIGTERM before the run could write
        (143, {"state": "running"}, False),
        (143, {"state": "crashed"}, True),  # only its kernel was ended
        (143, {"state": "stopped", "stopped_by": "its supervisor: step 3 hung"}, True),
        (137, {}, True),
        (137, {"state": "stopped"}, True),
        (1, {"state": "failed"}, True),
        (1, {"state": "stopped"}, False),
        (None, {}, False),
    ],
)
def test_what_somebody_stopped_does_not_go_on(code: int | None, record: dict[str, Any], accident: bool) -> None:
    assert is_accident(End(code), record) is accident


def test_a_run_that_was_cancelled_before_it_began_is_stopped_and_not_retried(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: Local, job: Job) -> None:
        if job.name == NAMES[1]:
            self.ended[job.name] = End(143, "Slurm says CANCELLED by 1000")
        else:
            Local.start(self, job)

    use(monkeypatch, start)
    assert sweep() == 1
    assert read_states() == {LOW: DONE, BEST: "stopped", HIGH: DONE}
    assert [run["attempts"] for run in read_record()["runs"]] == [1, 1, 1]


def test_a_run_that_somebody_was_faster_to_begin_waits_for_it(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Any] = []

    def start(self: Local, job: Job) -> None:
        if job.name == NAMES[1] and not held:
            folder = Path("runs", job.name)
            folder.mkdir(parents=True)
            held.append(lock_folder(folder))
            threading.Timer(0.5, held[0].close).start()
            self.ended[job.name] = End(2, None)
        else:
            Local.start(self, job)

    use(monkeypatch, start)
    assert sweep() == 0
    assert read_started() == [NAMES[0], NAMES[2], NAMES[1]]


def test_gates_that_failed_under_a_killed_sweep_are_kept(sweep: Sweep) -> None:
    assert sweep({NAMES[1]: ["gates", "ok"]}) == 1
    Path("runs/sweeps/rates/sweep.json").unlink()  # as if it had been killed before it heard of the end
    assert sweep({NAMES[1]: ["gates", "ok"]}) == 1
    assert read_states()[BEST] == "gates_failed" and len(read_started()) == 3
    assert sweep({NAMES[1]: ["gates", "ok"]}, only_missing=True) == 0


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_second_call_keeps_what_is_known_of_runs_that_it_has_not_come_to(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sweep() == 0
    seen: list[dict[str, str]] = []

    def start(self: Local, job: Job) -> None:
        seen.append(read_states())
        Local.start(self, job)

    use(monkeypatch, start)
    record = read_record()
    for number in (0, 1):  # as a sweep that was killed leaves them
        Path("runs", NAMES[number], "run.json").unlink()
        record["runs"][number]["state"] = "running"
    Path("runs/sweeps/rates/sweep.json").write_text(json.dumps(record))
    assert sweep() == 0
    assert seen[1] == {LOW: DONE, BEST: "stopped", HIGH: DONE}
    assert read_states() == {LOW: DONE, BEST: DONE, HIGH: DONE} and read_started() == [*NAMES, *NAMES[:2]]


def test_a_comparison_that_fails_ends_no_sweep(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(folder: Path) -> None:
        raise ValueError("two columns have one name")

    monkeypatch.setattr("forgekit.sweep.control.write_results", fail)
    monkeypatch.setattr("forgekit.sweep.run.read_results", fail)
    assert sweep() == 0
    assert "the results cannot be written: ValueError: two columns have one name" in capsys.readouterr().out
