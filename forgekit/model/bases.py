"""Whether two names mean one base model: a folder, a built-in one, or one of the Hub."""

from pathlib import Path

from ..config import Config
from .load import BUILT_IN
from .slice import name_base, split_base


def is_base_of(config: Config, made_for: str) -> bool:
    """Say whether an adapter that names `made_for` as its base, perhaps with a slice, was made for the recipe's."""
    saved = split_base(made_for)
    same_slice = name_base("", saved["model.slice"]) == name_base("", config.model.slice)
    return same_slice and is_same_base(saved["model.id"], config.model.id)


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
