"""`forgekit sweep`: checked, locked, run on a backend, compared."""

import json
import sys
from pathlib import Path
from typing import Any

from ..environment import set_environment
from ..errors import ConfigError
from ..run_folder import explain_disk
from ..run_lock import lock_folder
from .backends import open_backend
from .board import Board
from .control import Control
from .job import Backend
from .local import find_devices
from .plan import Plan, plan_sweep
from .results import read_results
from .search import OptunaSearch
from .source import Listed


def run_sweep(
    file: Path,
    backend: str = "local",
    address: str | None = None,
    slots: int | None = None,
    retries: int | None = None,
    only_missing: bool = False,
) -> int:
    """Run every point of a sweep that has not been run, and write the comparison into the sweep's folder.

    Args:
        file: SWEEP.yaml.
        backend: where the runs are made: local, ray or slurm.
        address: of the Ray cluster, or the partition that Slurm is asked for.
        slots: how many runs go on at once; None: as many as the backend has room for.
        retries: how often a run that failed goes on from its last checkpoint; None: as the file says.
        only_missing: also try again what failed in an earlier call.

    Returns the exit code: 0 all completed, 1 some did not, 128 + n after signal n.

    Raises:
        ConfigError: before anything starts, with every problem of the file and its points.
        RunError: the sweep's folder is in use, or the backend cannot be reached.
    """
    set_environment()
    check_options(backend, address, slots)
    plan = plan_sweep(file)
    if retries is not None:
        plan.sweep = plan.sweep.model_copy(update={"retries": retries})
    with explain_disk(plan.folder):
        plan.folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(plan.folder)
    try:
        source = OptunaSearch(plan, plan.folder) if plan.sweep.search else Listed(plan.points)
        place, has_gpu = open_place(backend, address, slots, plan)
        board = Board(sys.stdout)
        board.say(f"sweep {plan.sweep.name}: {count_runs(plan)}, {plan.folder}")
        control = Control(plan, place, source, board, plan.sweep.retries, only_missing, has_gpu)
        code = control.run()
        board.end()
        board.print(f"\n{describe_results(plan)}")
        return code
    finally:
        lock.close()


def check_options(backend: str, address: str | None, slots: int | None) -> None:
    """Raise ConfigError for options that would say nothing."""
    problems = []
    if backend == "local" and address:
        problems.append(f"--address {address}: runs on this machine have none. Add --backend ray or --backend slurm.")
    if slots == 0:
        problems.append("--slots 0: no run could ever begin. Give 1 or more, or leave it out.")
    if problems:
        raise ConfigError(problems)


def describe_results(plan: Plan) -> str:
    """Return the comparison and where it stands; what is wrong with it must not hide how the runs ended."""
    try:
        return f"{read_results(plan.folder)!r}\n\nResults: {plan.folder / 'results.csv'}, .parquet, .png"
    except Exception as error:  # noqa: BLE001  # the exit code tells of the runs, not of their table
        return f"The results cannot be read: {type(error).__name__}: {error}"


def show_plan(file: Path) -> str:
    """Check a sweep as a whole and return its points, one a line; nothing is written or started."""
    from ..table import write_value

    plan = plan_sweep(file)
    lines = [f"{point.name}  {write_value(point.settings)}" for point in plan.points]
    ranges = plan.sweep.search.space.items() if plan.sweep.search else ()
    lines += [f"{name}  {place.kind} {json.dumps(place.values)}" for name, place in ranges]
    better = "more" if plan.maximize else "less"
    return "\n".join([f"{count_runs(plan)}, compared by {plan.score} ({better} is better), {plan.folder}", *lines])


def count_runs(plan: Plan) -> str:
    """Return "12 runs", or how many a search makes."""
    search = plan.sweep.search
    return f"a search of {search.runs} runs" if search else f"{len(plan.points)} runs"


def open_place(name: str, address: str | None, slots: int | None, plan: Plan) -> tuple[Backend, bool]:
    """Return the backend, and whether its machines have GPUs.

    Raises ConfigError when this machine has fewer GPUs than a run needs, RunError when the backend cannot be reached.
    """
    sweep, gpus = plan.sweep, plan.count_gpus()
    chosen = {"slots": slots} if slots else {}
    if name == "ray":
        place: Any = open_backend(
            name, address=address or "auto", gpus=gpus if gpus == 0 else sweep.gpus, **chosen, **sweep.ray.model_dump()
        )
        return place, place.gpus > 0
    if name == "slurm":  # which of its machines have GPUs is for a partition, or a setting, to say
        options = sweep.slurm.model_dump() | ({"partition": address} if address else {})
        return open_backend(name, **chosen, **options), True
    if sweep.gpus is None and not find_devices():
        gpus = 0  # nobody asked for one
    place = open_backend(name, slots=slots, gpus=gpus)
    return place, bool(place.devices)
