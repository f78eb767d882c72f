"""Whether two names mean one base model."""

from pathlib import Path


def is_same_base(first: str, second: str) -> bool:
    """Say whether two names mean one base: the same folder, or the same model of the Hub."""
    if Path(first).is_dir() or Path(second).is_dir():
        return Path(first).resolve() == Path(second).resolve()
    return clean_hub_name(first) == clean_hub_name(second)


def clean_hub_name(name: str) -> str:
    """unsloth/gemma-3n-E2B-it-unsloth-bnb-4bit -> gemma-3n-e2b-it"""
    name = name.lower().rpartition("/")[2]
    for ending in ("-bnb-4bit", "-unsloth"):
        name = name.removesuffix(ending)
    return name
