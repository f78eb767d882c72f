"""What has to be known of a job beside the scheduler's database, as job.json among its staged files.

It outlives the server, so that a run which went on without it is found again.
"""

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..files import read_json, write_json
from ..run_folder import find_run_root
from ..run_lock import describe_process, is_alive
from .parameters import check_job, name_run, read_parameters

FILE = "job.json"
LOG = "run.log"  # what `forgekit run` prints


def write_record(staging: Path, **values: Any) -> None:
    """Put values into a job's file."""
    write_json(staging / FILE, read_record(staging) | values)


def read_record(staging: Path) -> dict[str, Any]:
    """Return a job's file; empty where there is none: not one of ours."""
    try:
        return read_json(staging / FILE)
    except RunError:
        return {}


def plan_run(
    notebook: Path, folder: Path, root: Path, parameters: Mapping[str, str], job: str, id: str
) -> dict[str, Any]:
    """Check a job and return what its run needs: the words behind `forgekit run`, where it runs, and its run's folder.

    Args:
        notebook: the staged copy.
        folder: where the original stands; recipes and data are looked for from there.
        root: the server's folder.
        job, id: the job's name and number.

    Raises ConfigError or RunNameError when `forgekit run` would refuse it.
    """
    given = read_parameters(parameters, folder, root)
    config = check_job(notebook, folder, given)
    name = given.run_name or name_run(job, id)
    words = [str(notebook), f"--cwd={folder}", f"--name={name}", *(f"--recipe={path}" for path in given.recipes)]
    # JSON is YAML on one line
    settings = [f"--set={setting}={json.dumps(value)}" for setting, value in given.settings.items()]
    runs = find_run_root(config.recipe, folder)
    return {"words": words + settings, "folder": str(folder), "runs": str(runs), "run": str(runs / name)}


def is_mine(record: Mapping[str, Any]) -> bool:
    """Say whether this server keeps the job: it took it on, or the one that did is gone."""
    server = record.get("server")
    return bool(record) and (server == describe_process() or not is_alive(server or {}))


def is_running(record: Mapping[str, Any]) -> bool:
    """Say whether the job's run has been started and has not ended."""
    return is_alive(record.get("process") or {})


def signal_run(record: Mapping[str, Any], number: int) -> None:
    """Send a signal to a job's run, if it still runs on this machine."""
    process = record.get("process") or {}
    if is_running(record) and process.get("machine") == platform.node():
        os.kill(process["pid"], number)
