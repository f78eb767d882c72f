"""Names that come from outside (a recipe, a run's name, an index file) as paths that stay inside one folder.

folder + "logs/x.log"  ->  folder/logs/x.log       "../x", "/x", "C:\\x", a link, NUL, 256 bytes  ->  refused
"""

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from .errors import RunError

LONGEST_NAME = 255  # bytes of one name, in all usual file systems
LONGEST_PATH = 4095  # bytes of a whole path on Linux, without its end


def explain_path(name: str) -> str | None:
    """Return why a text is no relative path that stays where it starts, or None; nothing is looked at on the disk."""
    windows = PureWindowsPath(name)  # a backslash or a drive from another system's file
    parts = {*PurePosixPath(name).parts, *windows.parts}
    problem = explain_name(name)
    if problem:
        return problem
    if PurePosixPath(name).is_absolute() or windows.drive or windows.root:
        return "is absolute"
    if ".." in parts:
        return "leads out of its folder (..)"
    return None if parts else "is empty"


def explain_name(name: str) -> str | None:
    """Return why no file of this system can have this path, or None."""
    if "\0" in name:
        return "holds a NUL"
    try:
        sizes = [len(os.fsencode(part)) for part in PurePosixPath(name).parts]
    except UnicodeEncodeError:
        return "holds half a character (a lone surrogate)"
    if max(sizes, default=0) > LONGEST_NAME:
        return f"has a name of {max(sizes)} bytes; the longest is {LONGEST_NAME}"
    if len(os.fsencode(name)) > LONGEST_PATH:
        return f"has {len(os.fsencode(name))} bytes; the longest path is {LONGEST_PATH}"
    return None


def check_inside(folder: Path, name: str | Path) -> Path:
    """Return folder/name. The folder itself may be anywhere, also behind a link.

    Raises RunError when the name is absolute, leads out of the folder, passes a symbolic link below it, or is no name that
    a file can have.
    """
    text = str(name)
    problem = explain_path(text)
    path = folder if problem else folder / text
    if not problem:
        links = [
            part for part in (path, *path.parents) if part != folder and folder in part.parents and part.is_symlink()
        ]
        problem = f"passes a symbolic link ({links[-1].name})" if links else None
    if problem:
        shown = text if len(text) <= 80 else f"{text[:77]}..."
        raise RunError(f"{shown!r} {problem}, and it has to stay inside of {folder}. Give another name.")
    return path


def check_status_file(value: str | None) -> str | None:
    """Return `train.status_file`, which may stand anywhere, so it only ever replaces what is a status file by its name.

    Raises ValueError, as pydantic wants it.
    """
    if value is None:
        return None
    problem = explain_name(value)
    path = Path(value if not problem else "x").expanduser()
    if not problem and path.suffix != ".json":
        problem = "does not end in .json"
    if not problem and path.is_symlink():
        problem = "is a symbolic link"
    if problem:
        raise ValueError(f"the name of a .json file, and no link, because it is written over; this {problem}")
    return value
