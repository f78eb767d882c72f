"""The queue: order, retries as resumes, what is kept, signals. Runs are a program that ends as it is told to."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from forgekit.__main__ import main
from forgekit.errors import ConfigError, RunError, RunNameError
from forgekit.run_lock import is_locked, lock_folder
from forgekit.sweep.job import End, Job
from forgekit.sweep.local import Local

from .conftest import FAKE, NAMES, RATES, read_record, read_started, read_states, write_sweep

pytestmark = pytest.mark.usefixtures("own_folder")

Sweep = Callable[..., int]
LOW, BEST, HIGH = (name.removeprefix("rates-") for name in NAMES)


def read_threads() -> set[str]:
    return {line.split("threads=")[1] for line in Path("started.txt").read_text().splitlines()}


# ---- order -----------------------------------------------------------------------------------------------------------


def test_runs_come_in_the_file_s_order_and_all_complete(sweep: Sweep, capsys: pytest.CaptureFixture) -> None:
    assert sweep() == 0
    assert read_started() == NAMES
    assert read_states() == dict.fromkeys((LOW, BEST, HIGH), "completed") and read_record()["state"] == "completed"
    lines = [line.split("  ", 1)[1] for line in capsys.readouterr().out.split("\n\n")[0].splitlines()]
    assert lines[0].startswith("sweep rates: 3 runs, ")
    assert lines[1:3] == [f"{NAMES[0]}  running", f"{NAMES[0]}  completed  json_equal 0.75"]
    log = Path("runs/sweeps/rates/logs", f"{NAMES[0]}.log").read_text()
    assert log == f"fake run {NAMES[0]}: completed\n"


def test_slots_share_the_cores_and_run_at_once(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forgekit.sweep.local.cpu_count", lambda: 8)
    assert sweep({"*": ["slow"]}, slots=3) == 0
    assert read_threads() == {"2"}  # eight cores for three
    finished = [Path("runs", name, "run.json").stat().st_mtime for name in NAMES]
    assert max(finished) - min(finished) < 0.6  # one after the other they would take a third of a second each


def test_each_gpu_gets_one_run_at_a_time(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    grid = {"train.learning_rate": [0.0005, 0.001, 0.002, 0.003]}
    assert sweep({"*": ["slow"]}, RATES | {"grid": grid}) == 0
    devices = [line.split("gpu=")[1].split()[0] for line in Path("started.txt").read_text().splitlines()]
    assert sorted(devices[:2]) == ["3", "GPU-5"] and sorted(devices[2:]) == ["3", "GPU-5"]


def test_runs_on_two_gpus_each_and_more_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert [Local(gpus=gpus).slots for gpus in (None, 1, 2, 3, 0)] == [4, 4, 2, 1, 1]
    with pytest.raises(ConfigError, match="each run needs 5 GPUs, and this machine shows 4"):
        Local(gpus=5)
    with pytest.raises(RunError, match="run wide needs 5 GPUs, and this machine shows 4"):
        Local().start(Job("wide", Path(), (), Path(), gpus=5))


# ---- retries and what is kept ----------------------------------------------------------------------------------------


def test_failed_and_killed_runs_go_on_and_refused_ones_and_gates_do_not(sweep: Sweep) -> None:
    behaviour = {NAMES[0]: ["fail", "ok"], NAMES[1]: ["crash", "ok"], NAMES[2]: ["gates", "ok"]}
    assert sweep(behaviour) == 1
    assert read_states() == {LOW: "completed", BEST: "completed", HIGH: "gates_failed"}
    assert sorted(read_started()) == sorted([NAMES[0], NAMES[0], NAMES[1], NAMES[1], NAMES[2]])
    assert [run["attempts"] for run in read_record()["runs"]] == [2, 2, 1]


def test_the_reason_of_a_failure_is_told_and_retries_have_an_end(sweep: Sweep, capsys: pytest.CaptureFixture) -> None:
    assert sweep({NAMES[0]: ["fail"], NAMES[1]: ["usage", "ok"]}, retries=2) == 1
    reasons = {run["name"]: (run["state"], run["attempts"], run["reason"]) for run in read_record()["runs"]}
    assert reasons[NAMES[0]] == ("failed", 3, "cell 4: ValueError: told to fail")
    assert reasons[NAMES[1]] == ("refused", 1, "forgekit: train.sede: no such setting")
    printed = capsys.readouterr().out
    assert f"{NAMES[0]}  waiting  cell 4: ValueError: told to fail; goes on from its last checkpoint" in printed
    assert f"{NAMES[0]}  running  attempt 3" in printed


def test_a_second_call_keeps_ends_and_only_missing_tries_failures_again(
    sweep: Sweep, capsys: pytest.CaptureFixture
) -> None:
    behaviour = {NAMES[1]: ["fail", "ok"]}
    assert sweep(behaviour, retries=0) == 1
    assert sweep(behaviour, retries=0) == 1 and len(read_started()) == 3
    assert (
        f"{NAMES[1]}  failed  cell 4: ValueError: told to fail" not in capsys.readouterr().out.split("sweep rates")[2]
    )
    assert sweep(behaviour, retries=0, only_missing=True) == 0
    assert read_started() == [*NAMES, NAMES[1]]
    assert sweep(behaviour, only_missing=True) == 0 and len(read_started()) == 4


def test_a_longer_file_runs_what_is_new(sweep: Sweep) -> None:
    assert sweep() == 0
    assert sweep({}, RATES | {"grid": {"train.learning_rate": [0.0005, 0.001, 0.002, 0.004]}}) == 0
    assert read_started() == [*NAMES, "rates-learning_rate-0.004"]


def test_a_completed_run_with_other_settings_is_not_taken_for_the_point(sweep: Sweep) -> None:
    assert sweep({}, RATES | {"settings": {"train.seed": 1}}) == 0
    with pytest.raises(ConfigError, match=f"run {NAMES[0]} is completed, with other settings: train.seed: 1, now 2"):
        sweep({}, RATES | {"settings": {"train.seed": 2}})
    assert len(read_started()) == 3


def test_a_run_whose_folder_somebody_still_has_waits(sweep: Sweep, capsys: pytest.CaptureFixture) -> None:
    Path("runs", NAMES[0]).mkdir(parents=True)
    lock = lock_folder(Path("runs", NAMES[0]))
    assert is_locked(Path("runs", NAMES[0]))
    threading.Timer(1.0, lock.close).start()
    assert sweep() == 0
    assert read_started() == [NAMES[1], NAMES[2], NAMES[0]]
    assert f"{NAMES[0]}  waits: another process still has its folder" in capsys.readouterr().out
    assert not is_locked(Path("runs", NAMES[0]))


class Lossy(Local):
    """A backend that loses a run's machine some times."""

    lost = 0

    def poll(self) -> dict[str, End]:
        ended = super().poll()
        for name in ended:
            if name == NAMES[1] and self.lost:
                self.lost -= 1
                (Path("runs") / name / "run.json").write_text('{"state": "running"}')
                ended[name] = End(None, "node 7 is gone")
        return ended


@pytest.mark.parametrize(("losses", "state"), [(2, "completed"), (9, "lost")])
def test_a_lost_machine_is_not_the_run_s_fault_up_to_a_limit(
    losses: int, state: str, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_lossy(slots: int | None, gpus: int | None) -> Lossy:
        backend = Lossy(slots, gpus, FAKE)
        backend.lost = losses
        return backend

    monkeypatch.setattr("forgekit.sweep.local.Local", open_lossy)
    assert sweep(retries=0) == (0 if state == "completed" else 1)
    assert read_states()[BEST] == state


def test_two_sweeps_of_one_name_do_not_meet(sweep: Sweep) -> None:
    Path("runs/sweeps/rates").mkdir(parents=True)
    lock = lock_folder(Path("runs/sweeps/rates"))
    with pytest.raises(RunNameError, match="is in use by process"):
        sweep()
    lock.close()


# ---- signals ---------------------------------------------------------------------------------------------------------


def wait_for(found: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def read_pids() -> list[int]:
    found = [Path("runs", name, "run.json") for name in NAMES]
    try:
        records = [json.loads(file.read_text()) for file in found if file.exists()]
    except ValueError:  # being written
        return []
    return [record["pid"] for record in records if "pid" in record]


def test_sigterm_stops_every_run_and_the_next_call_goes_on(sweep: Sweep, capsys: pytest.CaptureFixture) -> None:
    stopper = threading.Timer(
        0, lambda: (wait_for(lambda: len(read_pids()) == 2), os.kill(os.getpid(), signal.SIGTERM))
    )
    stopper.start()
    assert sweep({"*": ["wait", "ok"]}, slots=2) == 143
    stopper.join()
    assert read_states() == {LOW: "stopped", BEST: "stopped"} and read_record()["state"] == "stopped"
    assert not [pid for pid in read_pids() if psutil.pid_exists(pid)]
    assert "SIGTERM: 2 running are asked to save and stop" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert sweep({"*": ["wait", "ok"], NAMES[2]: ["ok"]}) == 0
    assert read_started()[2:] == NAMES


SWEEP_ALONE = """
import sys
from pathlib import Path
from forgekit.sweep import local
from forgekit.sweep.run import run_sweep

Local = local.Local
local.Local = lambda slots, gpus: Local(slots, gpus, {fake!r})
sys.exit(run_sweep(Path("sweep.yaml")))
"""


@pytest.mark.slow
def test_a_killed_sweep_can_be_called_again(sweep: Sweep, project_folder: Path) -> None:
    write_sweep(RATES)
    Path("behaviour.json").write_text(json.dumps({"*": ["wait", "ok"]}))
    path = os.pathsep.join((str(project_folder), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-c", SWEEP_ALONE.format(fake=FAKE)]
    alone = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL)
    wait_for(lambda: len(read_pids()) == 1)
    alone.kill()
    alone.wait()
    os.kill(
        read_pids()[0], signal.SIGKILL
    )  # this one does not watch over its parent; `forgekit run` does: test_orphan.py
    assert read_states() == {LOW: "running"}
    assert sweep({NAMES[0]: ["wait", "ok"]}) == 0
    assert read_started() == [NAMES[0], *NAMES]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_wrong_files_end_with_2_and_a_dry_run_starts_nothing(capsys: pytest.CaptureFixture) -> None:
    assert main(["sweep", "nothing.yaml"]) == 2
    assert main(["sweep", str(write_sweep(RATES, notebook="nothing.ipynb"))]) == 2
    error = capsys.readouterr().err
    assert "sweep nothing.yaml does not exist." in error and "notebook 'nothing.ipynb': no such file in" in error
    assert main(["sweep", str(write_sweep(RATES)), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("3 runs, compared by json_equal (more is better), ")
    assert lines[1] == f"{NAMES[0]}  train.learning_rate: 0.0005"
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slots", "0"], "--slots 0: no run could ever begin"),
        (["--address", "here:6379"], "--address here:6379: runs on this machine have none"),
    ],
)
def test_options_that_say_nothing_end_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["sweep", str(write_sweep(RATES)), *words]) == 2
    assert message in capsys.readouterr().err and not Path("runs").exists()


@pytest.mark.parametrize("words", [["--slots", "-1"], ["--retries", "x"], ["--backend", "cloud"]])
def test_wrong_options_end_with_2(words: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        main(["sweep", "sweep.yaml", *words])
    assert left.value.code == 2
