"""An export is whole or absent: written beside its place, verified there, then renamed into it.

models/.lora.part/   while it is written and read back
models/lora/         once it is verified
models/unverified/lora/   when a bound did not hold
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import ExportError
from ..files import share_files
from ..run_folder import shorten_path
from .verdict import place_verdict, write_summary

UNVERIFIED = "unverified"


def is_file(target: Path) -> bool:
    """Say whether a format is one file, which shares its folder with others."""
    return target.suffix == ".gguf"


def check_absent(target: Path, replace: bool) -> None:
    """Raise ExportError when something stands at an export's place and may not be replaced."""
    if target.exists() and not replace:
        raise ExportError(
            f"{shorten_path(target)} exists, and an export never writes over another by itself. Set export.replace: true to replace it "
            "once the new one is verified, or export in a new run."
        )


@contextlib.contextmanager
def drafted(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` to write to; what is left there behind the block is removed, also after an error.

    The folder's name is fixed, so what a killed process left is removed by the next.
    """
    draft = target.parent / f".{target.name}.part"
    shutil.rmtree(draft, ignore_errors=True)
    parents = [parent for parent in draft.parents if not parent.exists()]
    try:
        if is_file(target):
            draft.mkdir(parents=True)
            yield draft / target.name
        else:
            draft.parent.mkdir(parents=True, exist_ok=True)
            yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        for parent in parents:  # those made here, as long as they are empty
            with contextlib.suppress(OSError):
                parent.rmdir()


def settle(draft: Path, target: Path) -> Path:
    """Move a finished draft to its place and return it; what stood there goes only now."""
    share_files(draft if draft.is_dir() else draft.parent)
    if is_file(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for file in sorted(draft.parent.iterdir()):
            os.replace(file, target.parent / file.name)
        write_summary(target.parent)
        return target
    old = target.parent / f".{target.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        os.rename(target, old)
    os.rename(draft, target)
    shutil.rmtree(old, ignore_errors=True)
    return target


def place_unverified(target: Path, models: Path) -> Path:
    """Return where an export stands that did not verify: models/unverified/, the same below it."""
    return models / UNVERIFIED / target.relative_to(models)


def remove_export(target: Path) -> None:
    """Remove an unverified export of an earlier attempt, folder or file with its verdict; the last file takes its folder along."""
    if target.is_dir():
        shutil.rmtree(target)
    else:
        place_verdict(target).unlink(missing_ok=True)
        target.unlink(missing_ok=True)
        if any(target.parent.glob("*.verify.json")):
            write_summary(target.parent)
        else:
            shutil.rmtree(target.parent)
