"""Slurm jobs: what sbatch is given, exit codes, stops and requeues, through submitit's own executors and a stand-in Slurm."""

import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("submitit", reason='needs submitit: pip install "forgekit[slurm]"')

from forgekit.errors import ConfigError, RunError
from forgekit.sweep import slurm
from forgekit.sweep.claim import FOLDER
from forgekit.sweep.job import End
from forgekit.sweep.slurm import Slurm, Submitted

from .test_remote import COMMAND, make_job, read_events, wait_for

STAND_IN = Path(__file__).with_name("slurm_stand_in.py")
COMMANDS = ("sbatch", "srun", "sacct", "scancel", "scontrol")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a stand-in's state, its commands first on the PATH."""
    state, commands = tmp_path / "slurm", tmp_path / "bin"
    state.mkdir()
    commands.mkdir()
    for name in COMMANDS:
        (commands / name).write_text(f"#!{sys.executable}\n" + STAND_IN.read_text())
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STAND_IN", str(state))
    monkeypatch.setattr("submitit.SlurmJob.watcher._delay_s", 0.2)
    yield state
    for file in state.glob("*.state"):
        file.write_text("CANCELLED")  # what still waits ends
    (state / "full").unlink(missing_ok=True)


def wait_for_end(backend: Slurm, name: str = "toy") -> End:
    found: dict[str, End] = {}
    wait_for(lambda: found.update(backend.poll()) or name in found, 60)
    return found[name]


def whats(job: Any) -> list[str]:
    return [event["what"] for event in read_events(job)]


def count_steps(job: Any) -> list[int]:
    import json

    lines = (job.root / job.name / "logs" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


# ---- submitit's local executor ---------------------------------------------------------------------------------------


def test_an_exit_code_comes_back_and_a_stop_saves(tmp_path: Path) -> None:
    backend = Slurm(cluster="local", minutes=5, slots=2, command=COMMAND, lost_seconds=9)
    jobs = make_job(tmp_path, "--code", "3"), make_job(tmp_path, "--steps", "900", name="long")
    for job in jobs:
        backend.start(job)
    assert backend.free() == 0
    wait_for(lambda: read_events(jobs[1]) and len(read_events(jobs[0])) == 2)
    backend.stop("long")
    backend.stop("unknown")
    backend.close()
    assert backend.poll() == {"toy": End(3), "long": End(143)}
    assert whats(jobs[1]) == ["begin", "saved after SIGTERM"] and backend.free() == 2
    assert stat.S_IMODE((tmp_path / FOLDER / "slurm").stat().st_mode) == 0o700


def test_a_preempted_job_is_requeued_and_goes_on_where_it_was(tmp_path: Path) -> None:
    backend = Slurm(cluster="local", minutes=60, command=COMMAND)
    job = make_job(tmp_path, "--steps", "25")
    backend.start(job)
    wait_for(lambda: (tmp_path / "toy" / "checkpoint").exists())
    (task,) = psutil.Process(int(backend.running["toy"].submitted.job_id)).children()
    task.send_signal(signal.SIGUSR2)
    assert wait_for_end(backend) == End(0)
    assert whats(job) == ["begin", "saved after SIGTERM", "begin", "end"]
    assert count_steps(job) == list(range(1, 26))


# ---- submitit's Slurm executor, a stand-in for Slurm -------------------------------------------------------------------


def test_what_sbatch_is_given(cluster: Path, tmp_path: Path) -> None:
    (cluster / "full").touch()
    parameters = {"account": "lab", "additional_parameters": {"gres": "gpu:h200:2"}}
    backend = Slurm(partition="night", minutes=90, cpus=6, parameters=parameters, command=COMMAND)
    job = make_job(tmp_path, gpus=2)
    backend.start(job)
    lines = (cluster / "1.script").read_text().splitlines()
    wanted = "account=lab cpus-per-task=6 gpus-per-node=2 gres=gpu:h200:2 job-name=toy nodes=1 partition=night requeue"
    wanted += f" ntasks-per-node=1 time=90 signal=USR2@{slurm.WARNING_SECONDS} open-mode=append"
    assert {f"#SBATCH --{line}" for line in wanted.split()} <= set(lines)
    assert f"{sys.executable} -u -m submitit.core._submit {tmp_path / FOLDER / 'slurm'}" in " ".join(lines)
    backend.start(make_job(tmp_path, name="cpu"))
    assert not [line for line in (cluster / "2.script").read_text().splitlines() if "gpus" in line]
    assert backend.free() == 14
    began = time.monotonic()
    backend.close()  # both still wait for a place
    assert time.monotonic() - began < 20 and not read_events(job)


def test_a_job_that_still_waits_is_cancelled_by_a_stop(cluster: Path, tmp_path: Path) -> None:
    (cluster / "full").touch()
    backend = Slurm(command=COMMAND)
    backend.start(make_job(tmp_path))
    backend.stop("toy")
    assert wait_for_end(backend) == End(143, "stopped before it began")


def warn(task: int, state: Path) -> None:
    """A preemption with a warning, or the time limit."""
    os.kill(task, signal.SIGUSR2)


def take_away(task: int, state: Path) -> None:
    """A preemption without one: SIGTERM, and SIGKILL when the grace period is over; Slurm requeues the job."""
    os.kill(task, signal.SIGTERM)
    wait_for(lambda: "saved" in str(list((state.parent / "toy").rglob("events.jsonl"))[0].read_text()))
    time.sleep(1)
    (state / "1.requeue").touch()
    os.kill(task, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("end", [warn, take_away])
def test_a_job_whose_node_is_needed_is_requeued_under_its_number(
    end: Callable[[int, Path], None], cluster: Path, tmp_path: Path
) -> None:
    backend = Slurm(command=COMMAND, minutes=60)
    job = make_job(tmp_path, "--steps", "25")
    backend.start(job)
    wait_for(lambda: (tmp_path / "toy" / "checkpoint").exists())
    end(int((cluster / "1.task").read_text()), cluster)
    assert wait_for_end(backend) == End(0)
    assert whats(job) == ["begin", "saved after SIGTERM", "begin", "end"]
    assert count_steps(job) == list(range(1, 26))
    assert len(list(cluster.glob("*.script"))) == 1


# ---- a job that leaves no result ---------------------------------------------------------------------------------------


class Lost:
    """Stands in for submitit's job."""

    def __init__(self, state: str, done: bool, folder: Path):
        self.state, self.over = state, done
        self.paths = type("Paths", (), {"result_pickle": folder / "result.pkl", "stdout": folder / "log.out"})

    def done(self) -> bool:
        return self.over


@pytest.mark.parametrize(
    ("state", "code", "words"),
    [
        ("CANCELLED by 1000", 143, "Slurm says CANCELLED BY 1000"),
        ("NODE_FAIL", None, "Slurm says NODE_FAIL"),
        ("TIMEOUT", None, "Slurm says TIMEOUT"),
        ("FAILED", 1, "the job ended as FAILED and left no result; see"),
        ("OUT_OF_MEMORY", 1, "the job ended as OUT_OF_MEMORY"),
    ],
)
def test_the_state_says_how_a_job_without_a_result_ended(
    state: str, code: int | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Submitted(make_job(tmp_path), "a", Lost(state, True, tmp_path))
    assert one.read_end() is None  # the result may still be on its way
    monkeypatch.setattr(slurm, "RESULT_SECONDS", -1)
    end = one.read_end()
    assert end and end.code == code and str(end.reason).startswith(words)


def test_a_preempted_job_is_given_time_to_be_requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = Lost("PREEMPTED", False, tmp_path)
    one = Submitted(make_job(tmp_path), "a", lost)
    monkeypatch.setattr(slurm, "RESULT_SECONDS", -1)
    assert one.read_end() is None and one.over_at
    lost.state = "PENDING"
    assert one.read_end() is None and one.over_at is None
    lost.state = "PREEMPTED"
    monkeypatch.setattr(slurm, "REQUEUE_SECONDS", -1)
    assert one.read_end() == End(None, "Slurm says PREEMPTED")


def test_an_error_of_the_job_itself_is_told(tmp_path: Path) -> None:
    backend = Slurm(cluster="local", minutes=5, command=("/absent/python",))
    backend.start(make_job(tmp_path))
    end = wait_for_end(backend)
    assert end.code == 1 and "/absent/python" in str(end.reason)


def test_without_slurm_the_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RunError, match="this machine has no srun"):
        Slurm()


def test_a_wrong_parameter_is_refused_before_anything_is_submitted() -> None:
    with pytest.raises(ConfigError, match="slurm.parameters: Unknown argument 'acount'"):
        Slurm(cluster="local", parameters={"acount": "lab"})


def test_an_error_without_words_is_an_end_too(tmp_path: Path) -> None:
    def fail() -> End:
        raise RuntimeError("-" * 40)

    lost = Lost("FAILED", True, tmp_path)
    lost.result = fail  # type: ignore[attr-defined]
    lost.paths.result_pickle.touch()
    end = Submitted(make_job(tmp_path), "a", lost).read_end()
    assert end and end.code == 1 and str(end.reason).startswith("the job failed without a word; see ")


def test_a_stop_is_ordered_also_when_scancel_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Slurm(cluster="local", command=COMMAND)
    backend.cluster = "slurm"
    job, lost = make_job(tmp_path), Lost("PENDING", False, tmp_path)
    lost.job_id = "7"  # type: ignore[attr-defined]
    backend.running["toy"] = one = Submitted(job, "a", lost)
    monkeypatch.setenv("PATH", "")
    backend.stop("toy")
    assert one.asked == 1 and '"stop": 1' in (tmp_path / FOLDER / "toy" / "order.json").read_text()
    (tmp_path / FOLDER / "toy").rename(tmp_path / "away")
    (tmp_path / FOLDER / "toy").touch()  # the order cannot be written
    with pytest.raises(RunError, match="cannot be written"):
        backend.stop("toy")
    assert one.asked == 1  # a stop that was not told does not hurry the next one
