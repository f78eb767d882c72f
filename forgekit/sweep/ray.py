"""Runs on a Ray cluster: one Ray task a run, on any node that has the GPUs, over a folder that all nodes share.

A node that dies costs its runs what they learned since their last checkpoint. Ray's own retries are off: a run whose node
was given up is handed back as lost, the sweep starts it again, and the claim (claim.py) sees to it that the new attempt begins only
when the old one has ended, also on a node that Ray gave up while it was merely cut off.

Ray runs whatever reaches its ports, so token authentication is on here unless RAY_AUTH_MODE says otherwise; the nodes have to
be started with the same token (README.md). https://docs.ray.io/en/latest/ray-security/token-auth.html
"""

import contextlib
import os
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RunError
from .claim import LOST_SECONDS, find_folder, order, read_claim
from .job import End, Job, stop_all
from .remote import NOT_BEGUN, Attempt

TICK_SECONDS = 0.2
# read by Ray while it is imported
SETTINGS = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}


def run_attempt(
    job: Job, attempt: str, command: Sequence[str] | None = None, lost_seconds: float = LOST_SECONDS
) -> End:
    """Run a job on the node that Ray has chosen; this is the task. CUDA_VISIBLE_DEVICES is set by Ray."""
    return Attempt(job, attempt, command, lost_seconds).run()


class Ray:
    """The backend of a Ray cluster that is running already."""

    def __init__(
        self,
        address: str = "auto",
        gpus: int | None = None,
        cpus: int = 1,
        slots: int | None = None,
        command: Sequence[str] | None = None,
        lost_seconds: float = LOST_SECONDS,
    ):
        """Connect.

        Args:
            address: of the head node (`host:6379`); auto: RAY_ADDRESS, or the cluster that this machine is a node of.
            gpus: how many GPUs each run needs, for `free`; None: one where the cluster has any.
            cpus: CPU cores that Ray sets aside for each run; its OMP_NUM_THREADS.
            slots: how many runs go on at once; None: as many as the nodes have room for.
            command: what starts a run on a node; None: `-m forgekit` of the Python that its Ray runs in.
            lost_seconds: how long a run's machine has to be silent before another one begins with the run.

        Raises RunError when the cluster cannot be reached or refuses the token.
        """
        self.cpus, self.slots, self.command, self.lost_seconds = cpus, slots, command, lost_seconds
        self.ray = connect(address)
        self.gpus = gpus if gpus is not None else int(any(node.get("GPU") for node in self.nodes()))
        self.task = self.ray.remote(max_retries=0, retry_exceptions=False)(run_attempt)
        self.known: list[Mapping[str, float]] = []
        self.running: dict[str, tuple[Job, str, Any]] = {}
        self.asked: Counter[str] = Counter()  # how often each was asked to stop
        self.ended: dict[str, End] = {}

    def nodes(self) -> list[Mapping[str, float]]:
        """Return what each living node has: CPU, GPU, memory."""
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def start(self, job: Job) -> None:
        """Hand a job to Ray. Raises RunError when no node that was ever seen here has what it needs."""
        self.known += [node for node in self.nodes() if node not in self.known]
        if not any(count_room(node, self.cpus, job.gpus) for node in self.known):
            raise RunError(
                f"run {job.name} needs {self.cpus} CPU cores and {job.gpus} GPUs of one node, and no node of the Ray cluster has them."
            )
        attempt = uuid.uuid4().hex
        order(job, attempt)
        options = {"name": job.name, "num_cpus": self.cpus, "num_gpus": job.gpus}
        task = self.task.options(**options).remote(job, attempt, self.command, self.lost_seconds)
        self.running[job.name] = (job, attempt, task)

    def free(self) -> int:
        """Return how many more runs the living nodes have room for, beside this sweep's own.

        While nothing runs it is one at least, so that `start` says why no node can run it, or Ray waits for a node.
        """
        slots = self.slots or sum(count_room(node, self.cpus, self.gpus) for node in self.nodes())
        return max(0 if self.running else 1, slots - len(self.running))

    def poll(self) -> dict[str, End]:
        """Return the jobs that have ended since the last call."""
        tasks = {task: name for name, (_, _, task) in self.running.items()}
        done = self.ray.wait(list(tasks), num_returns=len(tasks), timeout=0)[0] if tasks else []
        ended, self.ended = self.ended, {}
        for task in done:
            del self.running[tasks[task]], self.asked[tasks[task]]
            ended[tasks[task]] = self.read_end(task)
        return ended

    def read_end(self, task: Any) -> End:
        """Return what a finished task says, or what Ray says of one that could not."""
        errors = self.ray.exceptions
        try:
            return self.ray.get(task)
        except errors.TaskCancelledError:
            return NOT_BEGUN
        except errors.RayTaskError as error:  # ours went wrong, for instance forgekit is not installed on the node
            return End(1, last_line(error))
        except errors.RayError as error:
            return End(None, f"{type(error).__name__}: {first_sentence(error)}")

    def stop(self, name: str) -> None:
        """Tell the node; a task that waits for a node is taken out of Ray's queue."""
        if name not in self.running:
            return
        job, attempt, task = self.running[name]
        order(job, attempt, self.asked[name] + 1)
        self.asked[name] += 1
        if (read_claim(find_folder(job)) or {}).get("attempt") != attempt:  # no node has begun with it
            self.ray.cancel(task)  # one that began in this moment hears it as SIGINT and stops as ordered

    def close(self) -> None:
        """Stop what still runs, wait for it, and leave the cluster, which goes on."""
        left = list(self.running)
        while self.running:
            left = stop_all(left, self.stop)
            self.ended |= self.poll()
            time.sleep(TICK_SECONDS)
        self.ray.shutdown()


def connect(address: str) -> Any:
    """Return the module `ray`, connected. Raises RunError."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        with contextlib.suppress(Exception):
            ray.shutdown()
        raise RunError(
            f"no Ray cluster at {address!r}: {first_sentence(error)}. Start its nodes with `ray start` (README.md), give "
            "--address HOST:PORT, and let RAY_AUTH_TOKEN_PATH name the file with the nodes' token."
        ) from None
    return ray


def count_room(node: Mapping[str, float], cpus: int, gpus: int) -> int:
    """Return how many runs fit on a node."""
    room = [node.get("CPU", 0) // cpus] if cpus else []
    room += [node.get("GPU", 0) // gpus] if gpus else []
    return int(min(room, default=0))


def first_sentence(error: BaseException) -> str:
    """Return how an error begins."""
    return str(error).strip().splitlines()[0].split(". ")[0].rstrip(".") if str(error).strip() else type(error).__name__


def last_line(error: BaseException) -> str:
    """Return an error's last line, which in a remote traceback is the error."""
    return str(error).strip().splitlines()[-1]
