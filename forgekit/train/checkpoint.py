"""Checkpoint folders that are complete or absent: written beside, flushed to disk, listed in a manifest, then renamed.

    checkpoints/.writing-checkpoint-12/     files, each flushed ─ manifest.json, last ─ rename ─> checkpoints/checkpoint-12/

The manifest holds name, size and SHA-256 of every file. Nothing of a folder whose files differ from it is ever read: not all
of them are safetensors or JSON, and PyTorch's own format is a pickle (read with weights_only, which runs no code).
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import RunError
from ..faults import strike
from ..files import write_json
from ..run_folder import now

MANIFEST = "manifest.json"
FORMAT = 1
WRITING, REPLACED, REMOVED = ".writing-", ".replaced-", ".removed-"
# without these transformers goes on silently with fresh moments, a restarted schedule or other random numbers
NEEDED = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
KEPT = 2  # newest ones, so that there is one to walk back to


def write_whole(path: Path, write: Callable[[Path], None], about: dict[str, Any]) -> None:
    """Write a checkpoint folder, complete or not at all, and read it back.

    Args:
        path: the folder, for instance checkpoints/checkpoint-12; one of the same name is replaced.
        write: is given a temporary folder and writes the files into it.
        about: what stands in the manifest beside the files.

    Raises RunError when the disk is full or another error of writing happens; the temporary folder is gone then.
    """
    clean_folder(path.parent)
    temporary = path.with_name(f"{WRITING}{path.name}")
    try:
        strike("save_open")
        temporary.mkdir(parents=True)
        write(temporary)
        strike("save_fsync")
        files = [describe_file(file, temporary) for file in list_files(temporary)]
        for file in list_files(temporary):
            sync(file)
        write_json(temporary / MANIFEST, {"format": FORMAT, "written_at": now(), **about, "files": files})
        sync(temporary)
        strike("save_rename")
        put_in_place(temporary, path)
        problem = verify_checkpoint(path)
        if problem:
            raise RunError(f"{path.name} does not read back as it was written: {problem}. The disk may be failing.")
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_disk_error(error):
            raise
        raise RunError(explain_failure(path, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_disk_error(error: Exception) -> bool:
    """Say whether writing failed; torch and safetensors hide the system's own error."""
    hidden = ("PytorchStreamWriter", "unexpected pos")  # the second when torch closes a file that it could not write
    return isinstance(error, OSError | SafetensorError) or any(name in str(error) for name in hidden)


def explain_failure(path: Path, error: Exception) -> str:
    """Say why a checkpoint could not be written, how much room there is, and what is safe."""
    why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error).splitlines()[0]
    whole = list_checkpoints(path.parent)
    newest = f"{whole[-1].name} is the newest one and untouched" if whole else "there is none before it"
    free = shutil.disk_usage(path.parent).free / 1e9
    return (
        f"{path.name} could not be written: {why} ({free:.2f} GB are free there); {newest}. "
        "Make room and start the run again: it goes on from there."
    )


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a written folder to its name; one that stands there is moved away first, and put back by `clean_folder` after a crash."""
    old = path.with_name(f"{REPLACED}{path.name}")
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def clean_folder(folder: Path) -> None:
    """Remove what a killed process left half done, and put back a checkpoint that it was about to replace."""
    for left in sorted(folder.glob(".*")) if folder.is_dir() else ():
        if left.name.startswith(REPLACED) and not (whole := folder / left.name.removeprefix(REPLACED)).exists():
            left.rename(whole)
        elif left.name.startswith((WRITING, REPLACED, REMOVED)):
            shutil.rmtree(left, ignore_errors=True)


def list_files(folder: Path) -> list[Path]:
    """Return the files below a folder but for its manifest, by name."""
    return sorted(file for file in folder.rglob("*") if not file.is_dir() and file != folder / MANIFEST)


def describe_file(file: Path, folder: Path) -> dict[str, Any]:
    """Return name, size in bytes and SHA-256 of a file, as they stand in a manifest."""
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"name": file.relative_to(folder).as_posix(), "size": file.stat().st_size, "sha256": digest}


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest. Raises RunError when it is missing or of another format."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RunError(f"{path} has no manifest that can be read") from None
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or not isinstance(manifest.get("files"), list)
    ):
        raise RunError(f"{path} has a manifest of another format")
    return manifest


def verify_checkpoint(path: Path) -> str | None:
    """Return why a checkpoint is not whole, or None when every file is the one that its manifest lists, and there is no other."""
    try:
        listed = {entry["name"]: entry for entry in read_manifest(path)["files"]}
    except RunError as error:
        return str(error).removeprefix(f"{path} ")
    found = {file.relative_to(path).as_posix(): file for file in list_files(path)}
    for name, entry in sorted(listed.items()):
        if name not in found:
            return f"{name} is missing"
        if (size := found[name].stat().st_size) != entry["size"]:
            return f"{name} has {size} bytes, its manifest says {entry['size']}"
    if extra := sorted(found.keys() - listed.keys()):
        return f"its manifest does not list {extra[0]}"
    if lacking := [name for name in NEEDED if name not in listed]:
        return f"{lacking[0]} is missing"
    if not any(name.endswith(".safetensors") for name in listed):
        return "it holds no weights"
    for name, entry in sorted(listed.items()):
        if describe_file(found[name], path)["sha256"] != entry["sha256"]:
            return f"{name} has changed since it was written"
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders, oldest step first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=find_step)


def find_step(path: Path) -> int:
    """Return the optimiser step after which a checkpoint was written."""
    return int(path.name.rpartition("-")[2])


def rotate(folder: Path, pinned: Iterable[str | None], kept: int = KEPT) -> None:
    """Remove all but the newest checkpoints and those that are pinned by name; each vanishes at once, by a rename."""
    for path in list_checkpoints(folder)[:-kept]:
        if path.name not in pinned:
            away = path.with_name(f"{REMOVED}{path.name}")
            path.rename(away)
            shutil.rmtree(away, ignore_errors=True)


def find_newest(folder: Path, say: Callable[[str], None] = print) -> Path | None:
    """Return the newest checkpoint that is whole, walking back over others with a message; None when there is none at all.

    Raises RunError when there are some and none is whole.
    """
    clean_folder(folder)
    passed = []
    for path in reversed(list_checkpoints(folder)):
        problem = verify_checkpoint(path)
        if problem is None:
            return path
        passed.append(f"{path.name} is not whole and is passed over: {problem}.")
        say(passed[-1])
    if passed:
        raise RunError(
            f"No checkpoint in {folder} is whole, so nothing can be resumed: {' '.join(passed)} "
            "train.resume: never starts from the first step and keeps them aside."
        )
    return None
