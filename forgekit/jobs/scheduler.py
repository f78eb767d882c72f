"""The queue: jobs wait as QUEUED until it is their turn, one at a time unless told otherwise.

POST /scheduler/jobs ── checked ──> QUEUED ── its turn ──> IN_PROGRESS ── run.json ──> COMPLETED, FAILED, STOPPED
                           └──> FAILED, with every problem      └── Stop: STOPPING, SIGTERM to the run ──┘
"""

import os
import signal
import threading
from pathlib import Path
from typing import IO, Any

from jupyter_scheduler.exceptions import IdempotencyTokenError, InputUriError, SchedulerError
from jupyter_scheduler.models import CreateJob, CreateJobDefinition, DescribeJob, Status, UpdateJobDefinition
from jupyter_scheduler.orm import Job
from jupyter_scheduler.scheduler import Scheduler
from jupyter_scheduler.utils import get_utc_timestamp
from traitlets import Integer, Type, default

from ..errors import ForgekitError, RunNameError
from ..run_lock import describe_process, lock_folder
from ..tokens import refuse_tokens
from .executor import LONGEST_MESSAGE, RunExecutor
from .outputs import OUTPUTS
from .record import is_mine, plan_run, read_record, signal_run, write_record

LOOK_SECONDS = 2.0  # another server may have freed a slot
SLOTS = "forgekit-slots"
VARIABLE = "FORGEKIT_JOBS"


class RunScheduler(Scheduler):
    """jupyter-scheduler's Scheduler with a queue, whose jobs are runs of forgekit.

    Its database and staged files belong to the user, not to one server: the slots are locks among them, so that two
    servers do not use one GPU, and each server runs its own jobs and those of servers that are gone.
    """

    execution_manager_class = Type(
        default_value=RunExecutor, klass="jupyter_scheduler.executors.ExecutionManager", config=True
    )
    max_running = Integer(
        min=1, config=True, help=f"How many jobs run at the same time; ${VARIABLE}, else 1. More than one share a GPU."
    )

    @default("max_running")
    def _max_running_default(self) -> int:
        return int(os.environ.get(VARIABLE) or 1)

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.work = threading.Event()
        self.take_over()
        for number in range(self.max_running):
            threading.Thread(target=self.serve, args=(number,), name=f"forgekit-jobs-{number}", daemon=True).start()

    # ---- making a job ------------------------------------------------------------------------------------------------

    def create_job(self, model: CreateJob) -> str:
        """Take a job on; what is wrong with it stands in the job, which has failed then. A token is not even stored."""
        self.refuse_tokens(model.parameters)
        if not model.job_definition_id and not self.file_exists(model.input_uri):
            raise InputUriError(model.input_uri)
        model.package_input_folder = None  # a run sees the notebook's own folder
        model.output_formats = [name for name in model.output_formats or OUTPUTS if name in OUTPUTS]
        with self.db_session() as session:
            token = model.idempotency_token
            if token and session.query(Job).filter(Job.idempotency_token == token).first():
                raise IdempotencyTokenError(token)
            job = Job(**model.dict(exclude_none=True, exclude={"input_uri"}), status=Status.CREATED)
            session.add(job)
            session.commit()
            described = DescribeJob.from_orm(job)
        self.stage(described, model)
        self.enqueue(described)
        return described.job_id

    def stage(self, job: DescribeJob, model: CreateJob) -> None:
        """Copy the notebook, and note where it came from and which server the job belongs to."""
        notebook = Path(self.get_staging_paths(job)["input"])
        notebook.parent.mkdir(parents=True, exist_ok=True)
        self.copy_input_file(model.input_uri, str(notebook))
        template = Path(self.staging_path, model.job_definition_id) if model.job_definition_id else None
        folder = (read_record(template).get("folder") if template else None) or self.find_folder(model.input_uri)
        write_record(notebook.parent, folder=folder, server=describe_process())

    def enqueue(self, job: DescribeJob) -> None:
        """Check a job, so that a misspelt setting shows now and not when its turn comes, and let it wait."""
        notebook = Path(self.get_staging_paths(job)["input"])
        folder = Path(read_record(notebook.parent)["folder"])
        try:
            plan_run(notebook, folder, Path(self.root_dir), job.parameters or {}, job.name, job.job_id)
        except ForgekitError as error:
            ended = {"status_message": str(error)[:LONGEST_MESSAGE], "end_time": get_utc_timestamp()}
            self.change(job.job_id, (Status.CREATED,), Status.FAILED, **ended, output_formats=[])
        else:
            self.change(job.job_id, (Status.CREATED,), Status.QUEUED)
            self.work.set()

    def create_job_definition(self, model: CreateJobDefinition) -> str:
        """Take a template on; jobs of a schedule are made from it."""
        self.refuse_tokens(model.parameters)
        model.package_input_folder = None
        id = super().create_job_definition(model)
        write_record(Path(self.staging_path, id), folder=self.find_folder(model.input_uri))
        return id

    def update_job_definition(self, job_definition_id: str, model: UpdateJobDefinition) -> None:
        """Change a template."""
        self.refuse_tokens(model.parameters)
        super().update_job_definition(job_definition_id, model)
        if model.input_uri:
            write_record(Path(self.staging_path, job_definition_id), folder=self.find_folder(model.input_uri))

    def refuse_tokens(self, parameters: dict[str, str] | None) -> None:
        """Raise SchedulerError, which the form shows, when a parameter holds a token."""
        try:
            refuse_tokens(parameters or {}, "the job's parameters")
        except ForgekitError as error:
            raise SchedulerError(str(error)) from None

    def find_folder(self, uri: str) -> str:
        """Return the folder in which a notebook of the server stands."""
        return os.path.dirname(os.path.join(self.root_dir, uri))

    # ---- the queue ---------------------------------------------------------------------------------------------------

    def change(self, job_id: str, before: tuple[Status, ...], after: Status, **values: Any) -> bool:
        """Change a job's state if it is one of these; say whether it was. Of two who try one succeeds."""
        with self.db_session() as session:
            row = session.query(Job).filter(Job.job_id == job_id, Job.status.in_(before))
            changed = row.update({"status": after, **values})
            session.commit()
        return bool(changed)

    def list_own(self, *statuses: Status) -> list[DescribeJob]:
        """Return this server's jobs in these states, the oldest first."""
        with self.db_session() as session:
            rows = session.query(Job).filter(Job.status.in_(statuses)).order_by(Job.create_time).all()
            jobs = [DescribeJob.from_orm(row) for row in rows]
        return [job for job in jobs if is_mine(read_record(Path(self.staging_path, job.job_id)))]

    def take_over(self) -> None:
        """Take on what a server that is gone has left: runs that go on without it, and jobs that wait."""
        for job in self.list_own(Status.QUEUED, Status.IN_PROGRESS, Status.STOPPING):
            write_record(Path(self.staging_path, job.job_id), server=describe_process())
            if job.status != Status.QUEUED:
                threading.Thread(target=self.make_executor(job).process, daemon=True).start()

    def serve(self, number: int) -> None:
        """Run one job after the other while this slot is free."""
        while True:
            try:
                ran = self.run_next(number)
            except Exception:  # a database that is locked too long, a full disk: the queue has to outlive it
                self.log.exception("forgekit: the queue goes on after an error")
                ran = False
            if not ran:
                self.work.wait(LOOK_SECONDS)
                self.work.clear()

    def run_next(self, number: int) -> bool:
        """Run the oldest waiting job in this slot; say whether there was one and the slot was free."""
        slot = self.take_slot(number)
        if slot is None:
            return False
        with slot:
            job = self.claim()
            if job:
                executor = self.make_executor(job)
                executor.slot = slot.fileno()
                executor.process()
        return job is not None

    def take_slot(self, number: int) -> IO[str] | None:
        """Lock a slot, or return None while another server or a run of its has it."""
        folder = Path(self.staging_path, SLOTS, str(number))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return lock_folder(folder)
        except RunNameError:
            return None

    def claim(self) -> DescribeJob | None:
        """Return the oldest waiting job, which nobody else gets then."""
        waiting = self.list_own(Status.QUEUED)
        return next((job for job in waiting if self.change(job.job_id, (Status.QUEUED,), Status.IN_PROGRESS)), None)

    def make_executor(self, job: DescribeJob) -> Any:
        """Return what runs a job."""
        return self.execution_manager_class(
            job_id=job.job_id,
            staging_paths=self.get_staging_paths(job),
            root_dir=self.root_dir,
            db_url=self.db_url,
        )

    # ---- stopping ----------------------------------------------------------------------------------------------------

    def stop_job(self, job_id: str) -> None:
        """Take a waiting job out of the queue, or ask its run to save and stop; asked again, the run ends at once."""
        ended = {"status_message": "Stopped before it began.", "end_time": get_utc_timestamp()}
        if self.change(job_id, (Status.CREATED, Status.QUEUED), Status.STOPPED, **ended, output_formats=[]):
            return
        if self.change(job_id, (Status.IN_PROGRESS, Status.STOPPING), Status.STOPPING):
            signal_run(read_record(Path(self.staging_path, job_id)), signal.SIGTERM)

    def delete_job(self, job_id: str) -> None:
        """Stop a job and forget it; its run's folder stays."""
        self.stop_job(job_id)
        super().delete_job(job_id)
