"""A real Ray cluster of two nodes on one machine, for tests: `python ray_cluster.py FOLDER SCENARIO` inside a network namespace.

Ray listens on all addresses and has no switch against it, so test_ray.py starts this file under `unshare --net`: nothing outside can
reach the nodes, which have the loopback addresses 127.0.0.2 and 127.0.0.3, a hostname each and a token of their own.
Every process is a descendant of this one, which adopts orphans, and is ended by its number.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from forgekit.errors import RunError
from forgekit.sweep.job import Job
from forgekit.sweep.ray import Ray

COMMAND = (sys.executable, str(Path(__file__).with_name("stand_in.py")))
LOST_SECONDS = 6.0
BEGAN = time.monotonic()
PORT = 6399
PR_SET_CHILD_SUBREAPER, SIOCSIFFLAGS, IFF_UP = 36, 0x8914, 1
# a lost node is noticed within two seconds instead of half a minute
IMPATIENT = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


def raise_loopback() -> None:
    """Switch on the loopback device of a new network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))


def descendants() -> list[psutil.Process]:
    """Return every process that was started from here and has not ended."""
    found = psutil.Process().children(recursive=True)
    return [process for process in found if is_there(process)]


def is_there(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def kill(processes: list[psutil.Process]) -> None:
    """Send SIGKILL by process number."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


class Cluster:
    """Two nodes with one CPU each; the second has what Ray believes to be a GPU."""

    def __init__(self, folder: Path, own: str):
        """Start both; `folder` for logs, `own` for Ray's sockets, whose paths may not exceed 107 bytes."""
        self.folder = folder
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        os.environ.update(IMPATIENT, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), RAY_USAGE_STATS_ENABLED="0")
        # importing this optional package of jsonschema takes each of Ray's dozen processes a second
        (folder / "light").mkdir()
        (folder / "light" / "rfc3987_syntax.py").write_text("raise ImportError")
        paths = [str(folder / "light"), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        head = ["--head", f"--port={PORT}", "--include-dashboard=false", "--no-monitor", f"--temp-dir={own}"]
        self.head = self.start_node("127.0.0.2", *head, "--num-gpus=0")
        wait_for(lambda: can_connect("127.0.0.2", PORT))
        self.second = self.start_second()

    def start_second(self) -> psutil.Process:
        return self.start_node("127.0.0.3", f"--address=127.0.0.2:{PORT}", "--num-gpus=1")

    def start_node(self, address: str, *options: str) -> psutil.Process:
        """Start `ray start` in the foreground, on a machine of another name as far as it can tell."""
        ray = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--block"]
        common = [
            "--num-cpus=1",
            "--object-store-memory=80000000",
            "--disable-usage-stats",
            "--include-log-monitor=false",
        ]
        name = f"node-{address.replace('.', '-')}"
        renamed = ["unshare", "--uts", "sh", "-c", 'echo "$0" > /proc/sys/kernel/hostname; exec "$@"', name]
        with open(self.folder / f"{name}.log", "ab") as log:
            command = [*renamed, *ray, f"--node-ip-address={address}", *common, *options]
            started = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        return psutil.Process(started.pid)

    def kill_second(self) -> None:
        """Kill every process of the second node, runs included; all of them are stopped first, so that none can react."""
        machine = read_machine(self.second)
        lost = [process for process in descendants() if read_machine(process) == machine]
        for process in lost:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        kill(lost)
        self.second.wait()

    def kill_raylet(self) -> None:
        """Kill the second node's own process alone; what runs there lives on."""
        kill([child for child in self.second.children(recursive=True) if child.name() == "raylet"])


def read_machine(process: psutil.Process) -> str:
    """Return the namespace that gives a process its hostname."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{process.pid}/ns/uts")
    return "gone"


def can_connect(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1):
        return True
    return False


def wait_for(found: Callable[[], Any], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not happen in time")
        time.sleep(0.1)


# ---- scenarios -------------------------------------------------------------------------------------------------------


def make_job(root: Path, name: str, *arguments: str, gpus: int = 0) -> Job:
    environment = {"FORGEKIT_RUNS": str(root), "OMP_NUM_THREADS": "1"}
    return Job(name, root, arguments, root, environment, gpus, root / f"{name}.log")


def toy(root: Path, name: str, *more: str, gpus: int = 0) -> Job:
    return make_job(root, name, "--name", name, *more, gpus=gpus)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_ends(backend: Ray, *names: str) -> dict[str, Any]:
    ends: dict[str, Any] = {}
    wait_for(lambda: ends.update(backend.poll()) or set(names) <= ends.keys(), 300)
    return {name: [end.code, end.reason] for name, end in ends.items()}


def lose_a_node(cluster: Cluster, root: Path, told: dict[str, Any]) -> None:
    """Exit codes, GPUs, a refused token, a stop, and a node that is killed during a run."""
    stranger = start_stranger(root)  # Ray tries for 20 seconds
    backend = open_ray(root)
    told["nodes"], told["free"] = len(backend.nodes()), backend.free()
    backend.start(toy(root, "gpu", "--steps", "60", "--seconds", "0.1", gpus=1))
    backend.start(toy(root, "code", "--code", "3"))
    try:
        backend.start(toy(root, "huge", gpus=5))
    except RunError as error:
        told["huge"] = str(error)
    wait_for(lambda: (root / "gpu" / "checkpoint").exists())
    told["seen"] = json.loads((root / "gpu" / "seen.json").read_text())
    told["code"] = wait_for_ends(backend, "code")
    lost_at = time.monotonic()
    cluster.kill_second()
    told["lost"] = wait_for_ends(backend, "gpu")
    told["told after"] = time.monotonic() - lost_at
    backend.start(toy(root, "gpu", "--steps", "60", "--seconds", "0.02"))
    told["resumed"] = wait_for_ends(backend, "gpu")
    told["resumed after"] = read_lines(root / "gpu" / "events.jsonl")[1]["at"] - lost_at
    backend.start(toy(root, "long", "--steps", "900"))
    wait_for(lambda: (root / "long" / "checkpoint").exists())
    backend.start(toy(root, "queued"))
    backend.stop("queued")
    backend.stop("long")
    told["stopped"] = wait_for_ends(backend, "long", "queued")
    told["stranger"] = stranger.communicate(timeout=60)[0]
    backend.close()


def lose_a_raylet(cluster: Cluster, root: Path, told: dict[str, Any]) -> None:
    """Only the node's own process dies; whatever Ray leaves alive there, the next attempt begins after it has ended."""
    backend = open_ray(root)
    backend.start(toy(root, "gpu", "--steps", "600", "--seconds", "0.1", gpus=1))
    wait_for(lambda: (root / "gpu" / "checkpoint").exists())
    run = psutil.Process(read_lines(root / "gpu" / "events.jsonl")[0]["pid"])
    cluster.kill_raylet()
    told["lost"] = wait_for_ends(backend, "gpu")
    wait_for(lambda: not is_there(run))
    told["ended at"] = time.monotonic()
    backend.start(toy(root, "gpu", "--steps", "60", "--seconds", "0.02"))
    told["resumed"] = wait_for_ends(backend, "gpu")
    backend.close()


def lose_a_training(cluster: Cluster, root: Path, told: dict[str, Any]) -> None:
    """The same with `forgekit run`: two equal trainings, one of which loses its node."""
    backend = open_ray(root, command=None, lost_seconds=20)
    given = (root / "arguments").read_text().split("\n")
    jobs = {name: make_job(root, name, *given, "--name", name, gpus=gpus) for name, gpus in (("whole", 0), ("torn", 1))}
    for job in jobs.values():
        backend.start(job)
    metrics = root / "torn" / "logs" / "metrics.jsonl"
    wait_for(lambda: sum("loss" in line for line in read_lines(metrics)) >= 8, 300)
    cluster.kill_second()
    told["lost at"] = len(read_lines(metrics))
    told["lost"] = wait_for_ends(backend, "torn")
    backend.start(make_job(root, "torn", *given, "--name", "torn"))
    told["resumed"] = wait_for_ends(backend, "torn")
    backend.close()


def open_ray(root: Path, **options: Any) -> Ray:
    """Connect once both nodes are there: a driver that comes earlier may hang on the second one, and die with it."""
    logs = [root / f"node-127-0-0-{number}.log" for number in (2, 3)]
    wait_for(lambda: all(log.exists() and "Ray runtime started" in log.read_text() for log in logs))
    print(f"two nodes after {time.monotonic() - BEGAN:.0f} s", flush=True)
    return Ray(f"127.0.0.2:{PORT}", **{"command": COMMAND, "lost_seconds": LOST_SECONDS} | options)


def start_stranger(root: Path) -> subprocess.Popen[str]:
    """Try to join with another token, in a process of its own."""
    (root / "wrong").write_text(secrets.token_hex(32))
    program = (
        "from forgekit.errors import RunError\nfrom forgekit.sweep.ray import Ray\n"
        f"try:\n    print('joined', Ray('127.0.0.2:{PORT}').nodes())\nexcept RunError as error:\n    print(error)"
    )
    environment = os.environ | {"RAY_AUTH_TOKEN_PATH": str(root / "wrong")}
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main(root: Path, scenario: str) -> None:
    """Run one scenario, end every process, and write what was seen to told.json."""
    raise_loopback()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    told: dict[str, Any] = {}
    own = tempfile.mkdtemp(prefix="ray-")
    try:
        cluster = Cluster(root, own)
        SCENARIOS[scenario](cluster, root, told)
    finally:
        told["seconds"] = time.monotonic() - BEGAN
        while left := descendants():
            kill(left)
            time.sleep(0.05)
        told["sockets"] = own  # each of Ray's processes names it
        shutil.rmtree(own)
        told["left"] = [process.pid for process in descendants()]
        (root / "told.json").write_text(json.dumps(told))


SCENARIOS = {"node": lose_a_node, "raylet": lose_a_raylet, "training": lose_a_training}

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
