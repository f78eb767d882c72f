"""Runs as Slurm jobs, through submitit: one job a run, over a folder that the login node and all others share.

    the time limit is near, or a preemption with a warning ─> SIGUSR2 ─> checkpoint ─> `scontrol requeue` ─> resumes
    a preemption without one, a user's scancel ─────────────> SIGTERM ─> checkpoint ─> what Slurm does with the job
    a node that fails ──────────────────────────────────────> Slurm requeues (--requeue) ─> resumes from the last checkpoint

Tested: submitit's local executor with real processes; its Slurm executor with stand-ins for sbatch, srun, sacct, scancel and
scontrol, which keep to their manual pages. Not tested, for want of a cluster: a real Slurm, so neither which processes its
plugins signal, nor its times of grace, nor how soon sacct knows. Slurm's accounting has to be on: without sacct a job
that dies without a word is never missed.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, RunError
from ..runs.session import find_package
from .claim import FOLDER, LOST_SECONDS, order
from .job import TERMINATED, End, Job, stop_all
from .remote import NOT_BEGUN, Attempt

TICK_SECONDS = 0.5
LOOK_SECONDS = 1.0  # between looks at a shared folder, a few requests a job each
RESULT_SECONDS = 30.0  # until a result that was written on another machine is seen here
REQUEUE_SECONDS = 600.0  # sacct says PREEMPTED also of a job that Slurm is about to requeue
VERDICT_SECONDS = 600.0  # from a SIGTERM of Slurm's to the SIGKILL that follows: KillWait, or a partition's GraceTime
CANCEL_SECONDS = 30.0  # for an answer of scancel
WARNING_SECONDS = 180  # before the time limit; twice the default grace period and two long steps find room in it


@dataclass(frozen=True)
class Task:
    """What a Slurm job executes; submitit stores it, and executes it again when the job is requeued."""

    job: Job
    attempt: str
    command: tuple[str, ...] | None = None
    lost_seconds: float = LOST_SECONDS

    def __call__(self) -> End:
        """Run the job on this node. A run that stopped for Slurm's sake returns nothing: its job is requeued or killed."""
        warning = find_warning()
        requeue = signal.getsignal(warning)  # submitit's: calls `checkpoint`, asks for the requeue and exits
        attempt = Attempt(self.job, self.attempt, self.command, self.lost_seconds)
        attempt.signals = (signal.SIGTERM, warning)
        end = attempt.run()
        if attempt.heard and end.code == TERMINATED and attempt.claim.read_order() is None:
            wait_for_verdict(attempt, warning)
            if warning in attempt.heard and callable(requeue):
                requeue(warning, None)
        return end

    def checkpoint(self) -> Any:
        """Return what a requeued job executes: the same run, which resumes under its name."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    __submitit_checkpoint__ = checkpoint  # its name in later versions


def find_warning() -> signal.Signals:
    """Return the signal by which submitit's jobs are warned; SUBMITIT_PREEMPT_SIGNAL may name another."""
    return signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]


def wait_for_verdict(attempt: Attempt, warning: int) -> None:
    """Wait for the SIGKILL behind a SIGTERM of Slurm's, so that the job's state decides: requeued, preempted or cancelled.

    A result would end the job for submitit while Slurm is about to requeue it. Returns at once with the warning, which
    asks for a requeue of our own, and outside of Slurm.
    """
    until = time.monotonic() + VERDICT_SECONDS
    with attempt.hear_signals():
        while "SLURM_JOB_ID" in os.environ and warning not in attempt.heard and time.monotonic() < until:
            time.sleep(TICK_SECONDS)


class Slurm:
    """The backend of the Slurm cluster that this machine submits to."""

    def __init__(
        self,
        partition: str | None = None,
        minutes: int = 24 * 60,
        cpus: int = 4,
        slots: int = 16,
        requeues: int = 20,
        parameters: Mapping[str, Any] | None = None,
        cluster: str = "slurm",
        command: Sequence[str] | None = None,
        lost_seconds: float = LOST_SECONDS,
    ):
        """Take what every job asks Slurm for.

        Args:
            partition: None: the cluster's default.
            minutes: time limit of one job; a run that needs more goes on in the next, `requeues` times at most.
            cpus: CPU cores a run.
            slots: how many jobs stand in the queue or run at once; the others wait with the sweep.
            parameters: more for sbatch, by the names of submitit's SlurmExecutor (mem, account, qos, constraint, setup, ...).
            cluster: slurm, or local: submitit's stand-in on this machine.
            command: what starts a run; None: `-m forgekit` of this Python.
            lost_seconds: how long a run's machine has to be silent before another one begins with the run.

        Raises:
            ConfigError: a parameter that there is not.
            RunError: this machine has no srun.
        """
        import submitit

        self.submitit, self.cluster, self.slots, self.requeues = submitit, cluster, slots, requeues
        self.command, self.lost_seconds = tuple(command) if command else None, lost_seconds
        self.common: dict[str, Any] = {"timeout_min": minutes, "cpus_per_task": cpus, "nodes": 1, "tasks_per_node": 1}
        self.common |= {"slurm_partition": partition, "slurm_signal_delay_s": WARNING_SECONDS}
        self.common |= {f"slurm_{name}": value for name, value in (parameters or {}).items()}
        more = {"requeue": True, **(parameters or {}).get("additional_parameters", {})}
        self.common["slurm_additional_parameters"] = more
        self.running: dict[str, Submitted] = {}
        self.ended: dict[str, End] = {}
        self.looked_at = 0.0
        if cluster == "slurm" and submitit.SlurmExecutor.affinity() <= 0:
            raise RunError(
                "this machine has no srun: start the sweep where you would call sbatch, or choose another --backend."
            )
        self.check_parameters()

    def check_parameters(self) -> None:
        """Raise ConfigError for a parameter that submitit does not know or take; it writes no file for that."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                self.make_executor(Path(folder), "check", 0)
            except (NameError, ValueError, TypeError, AssertionError) as error:  # submitit's ways to say no
                raise ConfigError(f"slurm.parameters: {str(error).splitlines()[0]}") from None

    def start(self, job: Job) -> None:
        """Submit a job. Raises RunError when Slurm refuses it."""
        attempt = uuid.uuid4().hex
        order(job, attempt)
        try:
            # what a job imports forgekit from; both executors hand this process's variables on
            with self.submitit.helpers.environment_variables(**find_package()):
                executor = self.open_executor(job)
                submitted = executor.submit(Task(job, attempt, self.command, self.lost_seconds))
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            raise RunError(f"Slurm does not take run {job.name}: {error}") from None
        self.running[job.name] = Submitted(job, attempt, submitted)

    def open_executor(self, job: Job) -> Any:
        """Return submitit's executor for a job; it keeps its files beside the claims, for this user's eyes."""
        folder = job.root / FOLDER / "slurm"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self.make_executor(folder, job.name, job.gpus)

    def make_executor(self, folder: Path, name: str, count: int) -> Any:
        """Return an executor with the parameters of a job that takes so many GPUs."""
        executor = self.submitit.AutoExecutor(folder, self.cluster, slurm_max_num_timeout=self.requeues)
        gpus = {"gpus_per_node": count} if count else {}
        executor.update_parameters(name=name, stderr_to_stdout=True, **self.common, **gpus)
        return executor

    def free(self) -> int:
        """Return how many more jobs may be submitted."""
        return max(0, self.slots - len(self.running))

    def poll(self) -> dict[str, End]:
        """Return the jobs that have ended since the last call; results are looked for once a second, sacct is asked seldom."""
        ended, self.ended = self.ended, {}
        if time.monotonic() - self.looked_at < LOOK_SECONDS:
            return ended
        self.looked_at = time.monotonic()
        for name, one in list(self.running.items()):
            end = one.read_end()
            if end:
                del self.running[name]
                ended[name] = end
        return ended

    def stop(self, name: str) -> None:
        """Order the run to stop, which its node reads within seconds; a job that still waits is cancelled."""
        if name not in self.running:
            return
        one = self.running[name]
        order(one.job, one.attempt, one.asked + 1)
        one.asked += 1
        if self.cluster == "slurm":
            # without a signal's name, scancel would leave a running job KillWait, 30 seconds, for its checkpoint
            command = ["scancel", "--state=PENDING", one.submitted.job_id]
            # when Slurm does not answer, a job that still waits reads the order as soon as it begins
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(command, capture_output=True, timeout=CANCEL_SECONDS)

    def close(self) -> None:
        """Stop what is still there, and wait for it."""
        left = list(self.running)
        while self.running:
            left = stop_all(left, self.stop)
            self.ended |= self.poll()
            time.sleep(TICK_SECONDS)


@dataclass
class Submitted:
    """A job in Slurm's hands; `over_at` is when it was first seen to have left them without a result (monotonic seconds)."""

    job: Job
    attempt: str
    submitted: Any
    asked: int = 0  # how often it was asked to stop
    over_at: float | None = None

    def read_end(self) -> End | None:
        """Return how the job ended, or None while it has not."""
        if self.submitted.paths.result_pickle.exists():
            return self.read_result()
        state = self.submitted.state.upper()
        preempted = state.startswith("PREEMPTED")
        if not preempted and not self.submitted.done():
            self.over_at = None
            return None
        self.over_at = self.over_at or time.monotonic()
        late = time.monotonic() - self.over_at > (REQUEUE_SECONDS if preempted else RESULT_SECONDS)
        never_ran = bool(self.asked) and state.startswith("CANCELLED")  # `stop` cancels those that wait
        return self.read_state(state) if late or never_ran else None

    def read_result(self) -> End:
        """Return what the job handed back, or the error that submitit caught there."""
        try:
            return self.submitted.result()
        except RuntimeError as error:  # submitit's; the traceback stands between two lines of dashes
            told = str(error).rsplit("-" * 22, 1)[0].strip("- \n").splitlines()
            return End(1, told[-1] if told else f"the job failed without a word; see {self.submitted.paths.stdout}")

    def read_state(self, state: str) -> End:
        """Return the end of a job that left no result; a machine's failure and a time limit are no fault of the run's."""
        if state.startswith("CANCELLED"):
            return NOT_BEGUN if self.asked else End(TERMINATED, f"Slurm says {state}")
        if state.startswith(("FAILED", "OUT_OF_MEMORY", "FINISHED")):
            return End(1, f"the job ended as {state} and left no result; see {self.submitted.paths.stdout}")
        return End(None, f"Slurm says {state}")
