"""One job: `forgekit run` as a process of its own, and its end as the job tells it.

run.json        completed   failed, crashed, gates_failed   stopped
the job         COMPLETED   FAILED, with the reason         STOPPED, with how it goes on
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jupyter_scheduler.executors import ExecutionManager
from jupyter_scheduler.models import JobFeature, Status
from jupyter_scheduler.orm import Job
from jupyter_scheduler.utils import get_utc_timestamp

from ..errors import ForgekitError, RunError
from ..exit_codes import USAGE
from ..files import read_json
from ..run_folder import DONE
from ..run_lock import describe_process
from ..runs.outcome import STOPPED, Outcome
from ..runs.session import find_package
from ..scrub import scrub
from .outputs import collect_outputs
from .record import LOG, is_running, plan_run, read_record, write_record

LOOK_SECONDS = 0.5
LONGEST_MESSAGE = 1024  # letters; the width of the database's column
FEATURES = (JobFeature.job_name, JobFeature.parameters, JobFeature.output_formats, JobFeature.job_definition, JobFeature.stop_job, JobFeature.delete_job)  # fmt: skip


class JobStopped(Exception):
    """The run was asked to stop, and has."""


class RunExecutor(ExecutionManager):
    """Runs one job with `forgekit run`, or waits for a run that an earlier server started.

    `slot` is a file that the run keeps open, so that its place in the queue stays taken for as long as it runs.
    """

    slot: int | None = None

    @property
    def staging(self) -> Path:
        """The folder of the job's staged files."""
        return Path(self.staging_paths["input"]).parent

    def execute(self) -> None:
        """Run, wait, and put the outputs where the scheduler expects them; raises when the run did not complete."""
        record = read_record(self.staging)
        code = None
        if record.get("process"):
            self.wait_for(record)
        else:
            code = self.start()
        record = read_record(self.staging)
        run = Path(record["run"])
        if code != USAGE:  # else the folder is another run's, whose name was asked for
            self.update(output_formats=collect_outputs(run, self.staging_paths))
        self.judge(run, code)

    def start(self) -> int:
        """Start the run and wait for it; return its exit code."""
        record = read_record(self.staging)
        # checked when the job was made; since then a recipe may have changed, or another run have taken the name
        folder = Path(record.get("folder", self.staging))
        job = self.model
        plan = plan_run(
            Path(self.staging_paths["input"]), folder, Path(self.root_dir), job.parameters or {}, job.name, self.job_id
        )
        environment = {**os.environ, **find_package(), "FORGEKIT_RUNS": plan["runs"]}
        with open(self.staging / LOG, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "forgekit", "run", *plan["words"]],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the server's terminal is not meant for the runs
                pass_fds=() if self.slot is None else (self.slot,),
            )
        write_record(self.staging, run=plan["run"], process=describe_process(process.pid))
        self.update(pid=process.pid)
        if self.asked_to_stop():  # while it was being started
            process.send_signal(signal.SIGTERM)
        return process.wait()

    def wait_for(self, record: dict[str, Any]) -> None:
        """Wait for a run that another process has started; nobody knows its exit code."""
        while is_running(record):
            time.sleep(LOOK_SECONDS)

    def judge(self, run: Path, code: int | None) -> None:
        """Raise when the run did not complete."""
        try:
            record = read_json(run / "run.json")
        except RunError:
            record = {}
        state = record.get("state")
        if code == USAGE or not record:  # refused before there was a run of this job's
            if self.asked_to_stop():
                raise JobStopped("Stopped before the run began.")
            raise RunError(read_refusal(self.staging / LOG, code))
        outcome = Outcome(state or "", record.get("error"), record.get("stopped_by"))
        if state == STOPPED:
            at = record.get("stopped_at_step")
            step = f" after step {at}" if at else ""
            raise JobStopped(
                f"The run {outcome.sentence()[:-1]}{step}. A job with run_name {run.name} goes on. Its files: {run}"
            )
        if state == "running":
            raise RunError(f"The run ended without a word. A job with run_name {run.name} goes on. Its files: {run}")
        if state != DONE:
            raise RunError(f"The run {outcome.sentence()} Its files: {run}")

    # ---- what the job tells ------------------------------------------------------------------------------------------

    def update(self, **values: Any) -> None:
        """Put values into the job's row; a job that was deleted meanwhile has none."""
        with self.db_session() as session:
            session.query(Job).filter(Job.job_id == self.job_id).update(values)
            session.commit()

    def asked_to_stop(self) -> bool:
        """Say whether somebody has pressed Stop."""
        with self.db_session() as session:
            status = session.query(Job.status).filter(Job.job_id == self.job_id).scalar()
        return status in (Status.STOPPING, Status.STOPPED)

    def before_start(self) -> None:
        """Note the start; the queue has set the state already, or somebody has asked to stop since."""
        with self.db_session() as session:
            row = session.query(Job).filter(Job.job_id == self.job_id)
            row.filter(Job.start_time.is_(None)).update({"start_time": get_utc_timestamp()})
            row.filter(Job.status.in_([Status.CREATED, Status.QUEUED])).update({"status": Status.IN_PROGRESS})
            session.commit()

    def on_failure(self, e: Exception) -> None:
        """Tell why; the form shows it in red."""
        words = str(e) if isinstance(e, JobStopped | ForgekitError) else f"{type(e).__name__}: {e}"
        status = Status.STOPPED if isinstance(e, JobStopped) else Status.FAILED
        self.finish(status, scrub(words)[:LONGEST_MESSAGE])

    def on_complete(self) -> None:
        """Tell that the run completed."""
        self.finish(Status.COMPLETED, None)

    def finish(self, status: Status, message: str | None) -> None:
        """Write the end."""
        self.update(status=status, status_message=message, end_time=get_utc_timestamp())

    # the scheduler calls these two with the class for `cls`, although they are no class methods there

    def supported_features(cls) -> dict[JobFeature, bool]:
        """Return what the form may offer."""
        return {feature: feature in FEATURES for feature in JobFeature}

    def validate(cls, input_path: str) -> bool:
        """Accept every notebook here: the job says what is wrong with one."""
        return True


def read_refusal(log: Path, code: int | None) -> str:
    """Return why `forgekit run` did not begin: what it said behind its name, else how it ended."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    _, found, words = text.rpartition("forgekit: ")
    return " ".join(words.split()) if found else f"`forgekit run` ended with exit code {code} before there was a run."
