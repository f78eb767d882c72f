"""How a Jupyter server is told to run jobs with forgekit."""

import importlib.util
from pathlib import Path

CLASSES = {
    "scheduler_class": "forgekit.jobs.scheduler.RunScheduler",
    "environment_manager_class": "forgekit.jobs.outputs.RunEnvironment",
    "job_files_manager_class": "forgekit.jobs.outputs.RunFiles",
}


def list_options() -> list[str]:
    """Return the options for a Jupyter server, and make the folder of its database; none without the extra `jobs`."""
    if importlib.util.find_spec("jupyter_scheduler") is None:
        return []
    from jupyter_core.paths import jupyter_data_dir

    Path(jupyter_data_dir()).mkdir(parents=True, exist_ok=True)  # on a fresh machine the extension would not load
    return [f"--SchedulerApp.{name}={place}" for name, place in CLASSES.items()]
