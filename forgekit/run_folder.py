"""One run, one folder: settings, state, log, metrics and models of a run, written so that a reader never meets half a file.

runs/<name>/
  run.json      settings with origins, versions, adapter, scores, exports; state: running | completed | failed |
                stopped | crashed | gates_failed
  plan.json     which modules learn, with ranks and numbers of parameters
  status.json   while training: step, total_steps, epoch, loss, learning_rate, eta_seconds, ...
  notebook.ipynb  notebook.html  parameters.json   under `forgekit run`
  checkpoints/  models/lora  models/merged  logs/training.log  logs/metrics.jsonl
  metrics/baseline.json  metrics/training-stats.json  metrics/scores.json  metrics/regression.json  metrics/gates.json
  quarantine.jsonl
"""

import contextlib
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .errors import RunError, RunNameError
from .files import read_json, scrub_files, write_json
from .paths import check_inside
from .run_lock import LOCK, lock_folder
from .scrub import looks_like_token

if TYPE_CHECKING:
    from .config import Config

PACKAGES = (
    "forgekit",
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "unsloth",
    "unsloth_zoo",
    "timm",
    "bitsandbytes",
    "papermill",
)
DONE = "completed"
SWEEPS = "sweeps"  # a folder below the run root that is no run


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class Run:
    """An open run: its folder and what run.json holds."""

    path: Path
    record: dict[str, Any]
    _lock: IO[str] | None = field(default=None, repr=False)

    def update(self, **values: Any) -> None:
        """Put values into run.json, at once and atomically."""
        self.record.update(values, updated_at=now())
        write_json(self.path / "run.json", self.record)

    def finish(self, state: str = DONE, error: str | None = None, **values: Any) -> None:
        """Record the end of the run and release its lock."""
        self.update(state=state, error=error, finished_at=now(), **values)
        scrub_files(self.path)
        self.release()

    def open_files(self) -> tuple[int, ...]:
        """Return the lock's file number for a child that is to keep the folder locked as long as it lives."""
        return (self._lock.fileno(),) if self._lock else ()

    def release(self) -> None:
        """Give the folder free, by word too: where there is no flock, another machine sees the words alone."""
        if self._lock:
            with contextlib.suppress(OSError):
                self._lock.truncate(0)
            self._lock.close()
            self._lock = None

    def __repr__(self) -> str:
        return f"Run({shorten_path(self.path)}, {self.record.get('state')})"


def shorten_path(path: Path) -> str:
    """Return a path as a notebook shows it: from the current folder when it stands below it or beside it, else whole."""
    here = Path.cwd()
    return os.path.relpath(path, here) if path.is_relative_to(here.parent) else str(path)


def find_run_root(recipe: Path | None, folder: Path | None = None) -> Path:
    """Return where runs stand: $FORGEKIT_RUNS, else runs/ beside the recipe's folder, else runs/ in `folder` or the current one."""
    if os.environ.get("FORGEKIT_RUNS"):
        return Path(os.environ["FORGEKIT_RUNS"]).absolute()
    return (
        recipe.parent.parent if recipe and os.access(recipe.parent.parent, os.W_OK) else folder or Path.cwd()
    ) / "runs"


def find_run(name: Path) -> Path:
    """Return the folder of a run that was given by its folder, or by its name below the run root. Raises RunError."""
    places = [name, find_run_root(None) / name]
    for place in places:
        if (place / "run.json").is_file():
            return place.absolute()
    raise RunError(f"no run {str(name)!r}: there is no run.json in {' or '.join(str(place) for place in places)}.")


def check_name(name: str | int) -> str:
    """Return the run's name; papermill makes a number of one that looks like it.

    Raises RunNameError when it is no folder name.
    """
    name = str(name) if type(name) is int else name
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise RunNameError(
            f"run name {name!r}: use up to 100 letters, digits, '.', '_' and '-', the first a letter or digit."
        )
    if name == SWEEPS:
        raise RunNameError(f"run name {name!r}: the folder of that name holds what sweeps write. Choose another.")
    if looks_like_token(name):
        raise RunError(
            "the run name looks like a token, and it would stand in many files. Choose another, and revoke it."
        )
    return name


def start_run(config: "Config", name: str | int | None = None, inside: Run | None = None, resume: bool = False) -> Run:
    """Make and lock the run's folder and write run.json with the settings and where each came from.

    Args:
        name: the folder's name; None or "" takes the time, or the name that `forgekit run` chose.
        inside: a run whose folder this one's is made in, for a second, smaller training in the same notebook.
        resume: go on with a run of that name that did not complete, from where `train.resume` says; else it is refused.

    Raises:
        RunNameError: a run of that name exists, or is in use.
        RunError: its folder cannot be written.
    """
    chosen = os.environ.get("FORGEKIT_RUN")
    name = check_name(name or chosen or datetime.now().strftime("%Y%m%d-%H%M%S"))
    path = check_inside(inside.path if inside else find_run_root(config.recipe), name)
    joins = name == chosen and not inside
    run = join_run(path) if joins else open_run(path, resume)
    try:
        with explain_disk(path):
            run.update(recipe=config.recipes, settings=describe_settings(config), versions=find_versions())
    except BaseException:
        run.release()
        raise
    return run


def join_run(path: Path) -> Run:
    """Go on with the run that `forgekit run` has begun: its supervisor holds the lock; anyone else has to take it."""
    record = {"name": path.name, "state": "running", "started_at": now()}
    if (path / "run.json").exists():
        record |= read_json(path / "run.json")
    with explain_disk(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = None if os.environ.get("FORGEKIT_SUPERVISED") else lock_folder(path)
    return Run(path, record | {"kernel_pid": os.getpid(), "state": "running"}, lock)


def open_run(path: Path, resume: bool) -> Run:
    """Make a run's folder, or open the one of a run that did not complete, and lock it; one process alone gets it.

    Raises RunNameError when the name is taken, RunError when the folder cannot be written.
    """
    check_unused(path, resume)
    with explain_disk(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(path)
    try:
        check_unused(path, resume)  # again, now that nobody else can change it
    except BaseException:
        lock.close()
        raise
    return Run(path, begin_attempt(path), lock)


def begin_attempt(path: Path) -> dict[str, Any]:
    """Return what run.json is to hold of an attempt that begins: the ones before stand in `attempts`, their notebooks aside."""
    record: dict[str, Any] = {"name": path.name, "state": "running", "pid": os.getpid(), "started_at": now()}
    if (path / "run.json").exists():
        record = read_json(path / "run.json") | record
        record["attempts"] = [*record.get("attempts", []), close_attempt(path)]
        for name in ("error", "finished_at", "stopped_by", "signal", "cell", "exit_code"):  # of the attempt before
            record.pop(name, None)
    return record


def close_attempt(path: Path) -> dict[str, Any]:
    """Return what run.json says of the attempt before, and put its notebook aside under a number."""
    record = read_json(path / "run.json")
    kept = {name: record.get(name) for name in ("started_at", "finished_at", "state", "error", "stopped_by")}
    number = len(record.get("attempts", [])) + 1
    for file in (path / "notebook.ipynb", path / "notebook.html"):
        if file.exists():
            aside = file.with_name(f"{file.stem}-{number}{file.suffix}")
            file.rename(aside)
            kept |= {"notebook": aside.name} if file.suffix == ".ipynb" else {}
    return kept


@contextlib.contextmanager
def explain_disk(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into RunError with the remedy."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"the run's folder {path} cannot be written: {error.strerror}. Set FORGEKIT_RUNS to a folder that can."
        ) from None


def check_unused(path: Path, resume: bool = False) -> None:
    """Raise RunNameError when a run stands in the folder whose files would be written over, or files of something else."""
    if (path / "run.json").exists():
        state = read_json(path / "run.json").get("state")
        if not resume or state == DONE:
            raise RunNameError(
                f"run {path.name!r} exists and is {state}: {path}. Its files are kept; choose another run_name."
            )
    elif path.is_dir() and any(file.name != LOCK for file in path.iterdir()):
        raise RunNameError(f"{path} exists and holds no run. Its files are kept; choose another run_name.")


def describe_settings(config: "Config") -> dict[str, dict[str, Any]]:
    """Return every setting with its value and origin, as it stands in run.json."""
    from .config import flatten

    return {name: {"value": value, "from": config.origin(name)} for name, value in flatten(config.model_dump()).items()}


def find_versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that decide a run's result; None where one is missing."""
    return {"python": platform.python_version()} | {name: find_version(name) for name in PACKAGES}


def find_version(package: str) -> str | None:
    """Return a package's installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
