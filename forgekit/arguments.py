"""What the `forgekit` command makes of the words it was given: times, settings, and where a list of settings ends."""

import argparse
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .recipe import parse_yaml

UNITS = {"s": 1, "m": 60, "h": 3600}  # seconds


def read_seconds(text: str) -> float:
    """Turn "90", "90s", "90m" or "12h" into seconds."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in UNITS else (text, "s")
    try:
        seconds = float(number) * UNITS[unit]
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write seconds, or 90m, 12h")
    return seconds


def read_folder(text: str) -> Path:
    """Return the path of a folder that exists."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no folder")
    return Path(text)


def spread_set(arguments: list[str]) -> list[str]:
    """Write `--set a=1 b=2 file` as `--set=a=1 --set=b=2 file`: argparse would take the file for a setting."""
    spread: list[str] = []
    waiting = taking = False  # for the first value after --set; for more of them
    for argument in arguments:
        if waiting and not argument.startswith("--"):
            spread[-1] = f"--set={argument}"
        elif taking and "=" in argument and not argument.startswith("-"):
            spread.append(f"--set={argument}")
        else:
            spread.append(argument)
            taking = argument == "--set"
        waiting = argument == "--set"
    return spread


def read_assignments(assignments: list[str]) -> dict[str, Any]:
    """Turn ["train.max_steps=60"] into {"train.max_steps": 60}. Raises ConfigError for one without "="."""
    settings = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: write it as name=value, for instance train.max_steps=60.")
        settings[name.strip()] = parse_yaml(value, f"--set {name}")
    return settings
