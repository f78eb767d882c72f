"""Files that a reader never meets half, without tokens, and readable by those that the user's umask says."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from .errors import RunError
from .scrub import HANDED_ON, Clean, CleanFile, choose_cleaning, scrub


@contextlib.contextmanager
def open_whole(path: Path, clean: Clean | None = None) -> Iterator[CleanFile]:
    """Open a text file that appears whole or not at all.

    Tokens are removed from what is written, and home folders from what is handed on (scrub.py), unless `clean` does else.
    """
    with open_beside(path, "w", "utf-8") as file:
        yield CleanFile(file, clean or choose_cleaning(path))


@contextlib.contextmanager
def open_beside(path: Path, mode: str, encoding: str | None = None) -> Iterator[IO[Any]]:
    """Open a file under a temporary name beside its own; when the block has ended well, it is flushed to disk and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~current_umask())  # mkstemp makes files that only the owner reads
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str, clean: Clean | None = None) -> None:
    """Write a file whole or not at all; `clean` as in `open_whole`."""
    with open_whole(path, clean) as file:
        file.write(text)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; it holds nothing that would have to be scrubbed."""
    with open_beside(path, "wb") as file:
        file.write(content)


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


def write_json(path: Path, value: Any, clean: Clean | None = None) -> None:
    """Write `value` as JSON, atomically; NaN and infinity, which JSON does not know, become null. `clean` as in `open_whole`."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, default=str) + "\n", clean)


def scrub_files(folder: Path) -> None:
    """Take tokens and home folders out of a run's notebook, pages and logs, whoever wrote them."""
    found = [*folder.iterdir(), *(folder / "logs").rglob("*")] if folder.is_dir() else []
    for file in found:
        if file.suffix in (*HANDED_ON, ".jsonl") and file.is_file() and not file.is_symlink():
            text = file.read_bytes().decode("utf-8", "replace")
            clean = scrub(text)
            if clean != text:
                write_text(file, clean)


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
