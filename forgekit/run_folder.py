"""One run, one folder: settings, state, log, metrics and models of a run, written so that a reader never meets half a file.

runs/<name>/
  run.json      settings with origins, versions, adapter, scores, exports; state: running | completed | failed |
                stopped | gates_failed
  plan.json     which modules learn, with ranks and numbers of parameters
  status.json   while training: step, total_steps, epoch, loss, learning_rate, eta_seconds, ...
  notebook.ipynb  notebook.html   under `forgekit run`
  checkpoints/  models/lora  models/merged  logs/training.log  logs/metrics.jsonl
  metrics/baseline.json  metrics/training-stats.json  metrics/scores.json  metrics/regression.json  metrics/gates.json
  quarantine.jsonl
"""

import contextlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .errors import RunError

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


@contextlib.contextmanager
def open_whole(path: Path) -> Iterator[IO[str]]:
    """Open a text file that appears whole or not at all: a temporary name beside it, flushed to disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~current_umask())  # mkstemp makes files that only the owner reads
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with open_whole(path) as file:
        file.write(text)


def current_umask() -> int:
    """Return the process's umask, which the system only tells while setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def share_files(folder: Path) -> None:
    """Give every file below a folder the permissions that the user's umask says; safetensors writes for the owner alone."""
    mode = 0o666 & ~current_umask()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically; NaN and infinity, which JSON does not know, become null."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, default=str) + "\n")


def finite(value: Any) -> Any:
    """Replace NaN and infinite floats by None, deeply."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def read_json(path: Path) -> Any:
    """Read a JSON file of a run. Raises RunError naming the file when it is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None


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

    def finish(self, state: str = DONE, error: str | None = None) -> None:
        """Record the end of the run and release its lock."""
        self.update(state=state, error=error, finished_at=now())
        if self._lock:
            self._lock.close()
            self._lock = None

    def __repr__(self) -> str:
        return f"Run({shorten_path(self.path)}, {self.record.get('state')})"


def shorten_path(path: Path) -> str:
    """Return a path as a notebook shows it: from the current folder when it stands below it or beside it, else whole."""
    here = Path.cwd()
    return os.path.relpath(path, here) if path.is_relative_to(here.parent) else str(path)


def find_run_root(recipe: Path | None) -> Path:
    """Return where runs stand: $FORGEKIT_RUNS, else runs/ beside the recipe's folder, else runs/ in the current folder."""
    if os.environ.get("FORGEKIT_RUNS"):
        return Path(os.environ["FORGEKIT_RUNS"]).absolute()
    return (recipe.parent.parent if recipe and os.access(recipe.parent.parent, os.W_OK) else Path.cwd()) / "runs"


def find_run(name: Path) -> Path:
    """Return the folder of a run that was given by its folder, or by its name below the run root. Raises RunError."""
    places = [name, find_run_root(None) / name]
    for place in places:
        if (place / "run.json").is_file():
            return place.absolute()
    raise RunError(f"no run {str(name)!r}: there is no run.json in {' or '.join(str(place) for place in places)}.")


def check_name(name: str | int) -> str:
    """Return the run's name; papermill makes a number of one that looks like it. Raises RunError when it is no folder name."""
    name = str(name) if type(name) is int else name
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise RunError(
            f"run name {name!r}: use up to 100 letters, digits, '.', '_' and '-', the first a letter or digit."
        )
    return name


def start_run(config: "Config", name: str | int | None = None, inside: Run | None = None) -> Run:
    """Make and lock the run's folder and write run.json with the settings and where each came from.

    Args:
        name: the folder's name; None or "" takes the time, or the name that `forgekit run` chose.
        inside: a run whose folder this one's is made in, for a second, smaller training in the same notebook.

    Raises:
        RunError: a run of that name exists, is in use, or its folder cannot be written.
    """
    name = check_name(name or os.environ.get("FORGEKIT_RUN") or datetime.now().strftime("%Y%m%d-%H%M%S"))
    path = (inside.path if inside else find_run_root(config.recipe)) / name
    if os.environ.get("FORGEKIT_RUN") != name:
        check_unused(path)
    record = {"name": name, "state": "running", "pid": os.getpid(), "started_at": now()}
    if (path / "run.json").exists():  # `forgekit run` has begun it
        record = read_json(path / "run.json") | record
    try:
        path.mkdir(parents=True, exist_ok=True)
        run = Run(path, record, lock_folder(path))
        run.update(recipe=config.recipes, settings=describe_settings(config), versions=find_versions())
    except OSError as error:
        raise RunError(
            f"the run's folder {path} cannot be written: {error.strerror}. Set FORGEKIT_RUNS to a folder that can."
        ) from None
    return run


def check_unused(path: Path) -> None:
    """Raise RunError when a run stands in the folder: its files are never written over."""
    if (path / "run.json").exists():
        state = read_json(path / "run.json").get("state")
        raise RunError(f"run {path.name!r} exists and is {state}: {path}. Its files are kept; choose another run_name.")


def lock_folder(path: Path) -> IO[str]:
    """Lock a run's folder for this process; the system frees the lock when the process ends, however it ends."""
    file = open(path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115  # open as long as the run
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has no flock; there the name alone protects
        pass
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise RunError(
            f"{path} is in use by process {owner}. Choose another run_name, or end that process first."
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


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
