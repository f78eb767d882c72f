"""What a job leaves: which files of a run the form offers, and how they come into the server's folder."""

import asyncio
import platform
import shutil
from pathlib import Path
from typing import Any

from jupyter_scheduler.environments import EnvironmentManager
from jupyter_scheduler.job_files_manager import JobFilesManager
from jupyter_scheduler.models import RuntimeEnvironment

ENVIRONMENT = "forgekit"
# format, which is also the end of the file's name -> what the form calls it, and where it stands in a run's folder
OUTPUTS = {
    "ipynb": ("Notebook", "notebook.ipynb"),
    "html": ("HTML", "notebook.html"),
    "run.json": ("Settings, versions, scores and state", "run.json"),
    "metrics.jsonl": ("Metrics of each step", "logs/metrics.jsonl"),
}


class RunEnvironment(EnvironmentManager):
    """The one environment that jobs run in: this Python, through `forgekit run`."""

    def list_environments(self) -> list[RuntimeEnvironment]:
        """Return it, with everything that a run leaves."""
        description = f"`forgekit run` with Python {platform.python_version()}, one job after the other"
        return [
            RuntimeEnvironment(
                name=ENVIRONMENT,
                label=ENVIRONMENT,
                description=description,
                file_extensions=["ipynb"],
                output_formats=list(OUTPUTS),
                metadata={},
            )
        ]

    def manage_environments_command(self) -> str:
        """Return no command: there is nothing to manage."""
        return ""

    def output_formats_mapping(self) -> dict[str, str]:
        """Return what each output is called."""
        return {name: title for name, (title, _) in OUTPUTS.items()}


class RunFiles(JobFilesManager):
    """Copies a job's outputs into the server's folder before it answers.

    The scheduler's own copies them in a second process, relative to the folder that the server was started in.
    """

    async def copy_from_staging(self, job_id: str, redownload: Any = False) -> None:
        """Copy what is not there yet, or everything."""
        job = self.scheduler.get_job(job_id, False)
        staged, names = self.scheduler.get_staging_paths(job), self.scheduler.get_job_filenames(job)
        folder = Path(self.scheduler.get_local_output_path(job))
        await asyncio.to_thread(
            copy_files, {Path(staged[key]): folder / names[key] for key in staged}, bool(redownload)
        )


def copy_files(files: dict[Path, Path], again: bool) -> None:
    """Copy files that exist; those that were copied before only when asked."""
    for source, target in files.items():
        if source.is_file() and (again or not target.exists()):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def collect_outputs(run: Path, staged: dict[str, str]) -> list[str]:
    """Copy a run's files to where the scheduler looks for them; return the formats of those that there are."""
    found = [name for name in OUTPUTS if name in staged and (run / OUTPUTS[name][1]).is_file()]
    for name in found:
        shutil.copyfile(run / OUTPUTS[name][1], staged[name])
    return found
