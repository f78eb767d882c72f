"""How a Jupyter server is told to run jobs with forgekit."""

import importlib.util

CLASSES = {
    "scheduler_class": "forgekit.jobs.scheduler.RunScheduler",
    "environment_manager_class": "forgekit.jobs.outputs.RunEnvironment",
    "job_files_manager_class": "forgekit.jobs.outputs.RunFiles",
}


def list_options() -> list[str]:
    """Return the options for a Jupyter server; none where the extra `jobs` is not installed."""
    if importlib.util.find_spec("jupyter_scheduler") is None:
        return []
    return [f"--SchedulerApp.{name}={place}" for name, place in CLASSES.items()]
