"""The points of a sweep: settings that differ, and a name that the same point always gets."""

import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..recipe import parse_yaml
from ..run_folder import check_name
from .file import RECIPE, Sweep

LONGEST = 90  # letters of a run's name; a folder's name may have 100


@dataclass(frozen=True)
class Point:
    """One run to be: its name, and what is its own (dotted names; `recipe` may be among them)."""

    name: str
    settings: Mapping[str, Any]


def list_points(sweep: Sweep) -> list[Point]:
    """Return the points of a grid, a list or a random sweep, each once, in the file's order; a search has none yet."""
    points = [Point(name_point(sweep.name, settings), settings) for settings in draw_settings(sweep)]
    return list({point.name: point for point in points}.values())


def draw_settings(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Yield the settings of each point; the last name of a grid changes fastest."""
    if sweep.grid is not None:
        for values in itertools.product(*sweep.grid.values()):
            yield dict(zip(sweep.grid, values, strict=True))
    elif sweep.list is not None:
        yield from map(dict, sweep.list)
    elif sweep.random is not None:
        generator = random.Random(sweep.random.seed)
        for _ in range(sweep.random.runs):
            yield {name: place.draw(generator) for name, place in sweep.random.space.items()}


def name_point(sweep: str, settings: Mapping[str, Any]) -> str:
    """Return a run's name: the sweep's, and each setting's last word with its value.

    {"train.learning_rate": 0.001, "adapter.r": 8} -> "rates-learning_rate-0.001-r-8". Where letters had to be left out, or
    there are too many, some of the point's hash tell it from others.
    """
    words = [(key, write_word(name, settings[name])) for name, key in shorten_names(settings).items()]
    name = "-".join([sweep, *(f"{key}-{word}" for key, word in words)])
    exact = all(is_exact(value, word) for value, (_, word) in zip(settings.values(), words, strict=True))
    # a point of a list may be the recipe as it is
    if words and exact and len(name) <= LONGEST:
        return check_name(name)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return check_name(f"{name[: LONGEST - 9].rstrip('-.')}-{digest}")


def shorten_names(names: Iterable[str]) -> dict[str, str]:
    """Return each setting's last word, and the whole name where two end alike: data.path and adapter.path."""
    names = list(names)
    ends = [name.rpartition(".")[2] for name in names]
    return {name: end if ends.count(end) == 1 else name for name, end in zip(names, ends, strict=True)}


def write_word(name: str, value: Any) -> str:
    """Return a value in letters that a folder's name may have; of a recipe the file's name."""
    if name == RECIPE and isinstance(value, str):
        value = "+".join(Path(part).stem for part in re.split(r"\s+\+\s+", value))
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")


def is_exact(value: Any, word: str) -> bool:
    """Say whether a word of a name stands for this value alone."""
    read = parse_yaml(word, "a name")
    return type(read) is type(value) and read == value
