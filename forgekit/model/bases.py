"""Whether two names mean one base model: a folder, a built-in one, or one of the Hub."""

from pathlib import Path

from .load import BUILT_IN


def is_same_base(first: str, second: str) -> bool:
    """Say whether two names mean one base.

    Hub names are compared without their owner and without the endings of quantised copies, which Unsloth loads instead.
    """
    folders = [find_folder(name) for name in (first, second)]
    if any(folders):
        return folders[0] == folders[1]
    return clean_hub_name(first) == clean_hub_name(second)


def find_folder(name: str) -> Path | None:
    """Return the folder that a name stands for on this machine, or None."""
    folder = BUILT_IN.get(name) or Path(name).expanduser()
    return folder.resolve() if folder.is_dir() else None


def clean_hub_name(name: str) -> str:
    """unsloth/gemma-3n-E2B-it-unsloth-bnb-4bit -> gemma-3n-e2b-it"""
    name = name.lower().rpartition("/")[2]
    for ending in ("-bnb-4bit", "-unsloth"):
        name = name.removesuffix(ending)
    return name
