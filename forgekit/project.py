"""The notebooks and recipes that come with the package, copied to a folder of the user's."""

import shutil
from pathlib import Path

from .errors import RunError

PACKAGED = Path(__file__).parent / "_project"  # in an installed wheel
FOLDERS = ("notebooks", "params")


def find_project() -> Path:
    """Return the folder that holds notebooks/ and params/: in the wheel, or the checkout of an editable install."""
    places = (PACKAGED, Path(__file__).parent.parent)
    for place in places:
        if all((place / folder).is_dir() for folder in FOLDERS):
            return place
    raise RunError(
        f"This installation holds no notebooks (looked in {' and '.join(map(str, places))}). Reinstall forgekit."
    )


def init_project(folder: Path) -> list[Path]:
    """Copy notebooks/ and params/ into `folder`; return the files written.

    Raises RunError when one of the files is already there: nothing is written over.
    """
    source = find_project()
    files = [
        file
        for name in FOLDERS
        for file in sorted((source / name).rglob("*"))
        if file.suffix in (".ipynb", ".yaml") and ".ipynb_checkpoints" not in file.parts
    ]
    targets = [folder / file.relative_to(source) for file in files]
    there = [target for target in targets if target.exists()]
    if there:
        raise RunError(f"{there[0]} exists already, so nothing was copied. Choose an empty folder.")
    for file, target in zip(files, targets, strict=True):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        except OSError as error:
            raise RunError(f"{target} cannot be written: {error.strerror}.") from None
    return targets
