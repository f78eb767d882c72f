"""Runs on this machine: one on each GPU at a time, or on a part of the CPU's cores."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence

from ..errors import ConfigError, RunError
from ..hardware import cpu_count
from ..runs.session import find_package
from ..runs.supervise import PARENT
from .job import TERMINATED, End, Job

VISIBLE, THREADS = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"
COMMAND = (sys.executable, "-m", "forgekit")
TICK_SECONDS = 0.1


class Local:
    """The backend of one machine. Each run is a process of its own, with its own GPUs, and is ended by its number."""

    def __init__(self, slots: int | None = None, gpus: int | None = None, command: Sequence[str] = COMMAND):
        """Take how many runs go on at once, how many GPUs each needs (None: what its job says), and how one is started.

        By default as many as have GPUs of their own, and one where there are none. More slots than that share GPUs.

        Raises ConfigError when a run needs more GPUs than there are.
        """
        self.command = tuple(command)
        self.devices = [] if gpus == 0 else find_devices()
        if gpus and gpus > len(self.devices):
            raise ConfigError(
                f"each run needs {gpus} GPUs, and this machine shows {len(self.devices)} ({VISIBLE}, nvidia-smi)."
            )
        self.slots = slots or max(1, len(self.devices) // (gpus or 1))
        self.waiting: deque[Job] = deque()
        self.running: dict[str, tuple[subprocess.Popen[bytes], tuple[str, ...]]] = {}
        self.ended: dict[str, End] = {}
        # the runs hold one end and see it close when this process ends, however that happens
        self.theirs, self.ours = os.pipe()

    def start(self, job: Job) -> None:
        """Queue a job, and start it when there is room."""
        self.waiting.append(job)
        self.fill()

    def free(self) -> int:
        """Return how many more may be started now."""
        return max(0, self.slots - len(self.running) - len(self.waiting))

    def poll(self) -> dict[str, End]:
        """Return the jobs that have ended since the last call."""
        for name, (process, _) in list(self.running.items()):
            code = process.poll()
            if code is not None:
                del self.running[name]
                reason = f"ended by {signal.Signals(-code).name}" if code < 0 else None
                self.ended[name] = End(128 - code if code < 0 else code, reason)
        self.fill()
        ended, self.ended = self.ended, {}
        return ended

    def stop(self, name: str) -> None:
        """Send SIGTERM, or take a job out of the queue."""
        for job in [job for job in self.waiting if job.name == name]:
            self.waiting.remove(job)
            self.ended[name] = End(TERMINATED, "stopped before it started")
        if name in self.running:
            self.running[name][0].send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Stop what still runs and wait for it: each run ends within its own grace period."""
        for name in [*(job.name for job in self.waiting), *self.running]:
            self.stop(name)
        while self.running:
            self.ended |= self.poll()
            time.sleep(TICK_SECONDS)
        for end in (self.ours, self.theirs):
            os.close(end)

    def fill(self) -> None:
        """Start waiting jobs in their order, as long as there is room."""
        while self.waiting and len(self.running) < self.slots:
            self.launch(self.waiting.popleft())

    def launch(self, job: Job) -> None:
        """Start one job on the GPUs that the fewest others use. Raises RunError when it cannot be started."""
        used = Counter(device for _, devices in self.running.values() for device in devices)
        devices = tuple(sorted(self.devices, key=lambda device: used[device])[: job.gpus])
        if len(devices) < job.gpus:
            raise RunError(f"run {job.name} needs {job.gpus} GPUs, and this machine shows {len(self.devices)}.")
        environment = os.environ | {PARENT: str(self.theirs), VISIBLE: ",".join(devices), **find_package()}
        if self.slots > 1:
            environment.setdefault(THREADS, str(max(1, cpu_count() // self.slots)))
        try:
            log = open_log(job)
            try:
                # a session of its own: Ctrl-C in this terminal reaches the sweep alone, which then asks its runs
                process = subprocess.Popen(
                    [*self.command, *job.arguments],
                    cwd=job.folder,
                    env=environment | job.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(self.theirs,),
                    start_new_session=True,
                )
            finally:
                os.close(log)
        except OSError as error:
            raise RunError(f"run {job.name} cannot be started: {error}") from None
        self.running[job.name] = (process, devices)


def open_log(job: Job) -> int:
    """Return an open file for what a job prints, behind what earlier attempts printed."""
    if job.log is None:
        return os.open(os.devnull, os.O_WRONLY)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    return os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)


def find_devices() -> list[str]:
    """Return the GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES gives them."""
    named = os.environ.get(VISIBLE)
    if named is not None:
        return [device.strip() for device in named.split(",") if device.strip() not in ("", "-1")]
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [
        str(number) for number, _ in enumerate(line for line in done.stdout.splitlines() if line.startswith("GPU "))
    ]
