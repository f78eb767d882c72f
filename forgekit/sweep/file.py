"""SWEEP.yaml: which notebook, which settings all runs share, and how the points differ; checked as a recipe is.

grid    every combination of the values           {train.learning_rate: [1e-4, 2e-4], adapter.r: [8, 16]}
list    the points one by one                     [{adapter.r: 8}, {adapter.r: 32, recipe: params/text.yaml}]
random  so many points, drawn with a seed         {runs: 20, seed: 1, space: {train.learning_rate: {log_uniform: [1e-5, 1e-3]}}}
search  the same space, but Optuna draws, and weak runs are ended early
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from ..arguments import read_seconds
from ..config import NAMES, PLAIN_WORDS, flatten
from ..conflicts import suggest
from ..errors import ConfigError, RunError
from ..recipe import read_recipe
from ..run_folder import check_name
from ..settings import Names, Section, setting
from ..tokens import describe_planted
from .space import Range, check_range

RECIPE = "recipe"  # may differ from point to point as a setting does
WAYS = ("grid", "list", "random", "search")


def check_sweep_name(value: Any) -> Any:
    """Refuse what is no folder name, and a name that leaves no room for a run's."""
    try:
        name = check_name(value)
    except RunError as error:
        raise ValueError(f"a folder's name ({error})") from None
    if len(name) > 60:
        raise ValueError("at most 60 letters: its runs' names begin with it")
    return name


def check_time(value: Any) -> Any:
    """Refuse what `forgekit run` would not take for a time."""
    try:
        read_seconds(str(value))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"a time ({error})") from None
    return str(value)


def check_settings(value: Any) -> Any:
    """Return settings as dotted names."""
    if not isinstance(value, Mapping):
        raise ValueError("settings and their values, for instance {train.max_steps: 60}")
    return flatten(value)


Settings = Annotated[dict[str, Any], BeforeValidator(check_settings)]
Time = Annotated[str, BeforeValidator(check_time)]
Space = dict[str, Annotated[Range, BeforeValidator(check_range)]]
Choices = dict[str, Annotated[tuple[Any, ...], Field(strict=False, min_length=1)]]


class Objective(Section):
    """By what the runs are compared."""

    score: str | None = setting(
        None,
        "one of evaluate.metric, or held_out_loss (the best during training); empty: the first of evaluate.metric",
    )
    direction: Literal["maximize", "minimize"] | None = setting(
        None, "whether more or less of it is better; empty: as the metric says"
    )


class Drawn(Section):
    """Points drawn from ranges."""

    runs: int = Field(description="how many points are drawn", ge=1, le=10_000)
    seed: int = setting(3407, "the same seed and space give the same points", ge=0, lt=2**32)
    space: Space = Field(description="a range for each setting", min_length=1)


class Prune(Section):
    """Successive halving (ASHA): of the runs that have come as far, the best 1 / reduction go on."""

    by: Literal["held_out_loss", "loss"] = setting("held_out_loss", "what is compared while they run")
    first_step: int = Field(description="the step of the first comparison; the next is `reduction` times as far", ge=1)
    reduction: int = setting(3, "one of so many runs goes on", ge=2, le=100)


class Search(Drawn):
    """Points drawn by Optuna's TPE sampler, which learns from the runs that have ended."""

    first_draws: int = setting(10, "points that are drawn at random before it learns", ge=1)
    prune: Prune | None = setting(None, "ends weak runs early; empty: every run comes to its end")


class RayRuns(Section):
    """What Ray sets aside for each run beside its GPUs."""

    cpus: int = setting(1, "CPU cores", ge=1)


class SlurmRuns(Section):
    """What each run's job asks Slurm for beside its GPUs."""

    partition: str | None = setting(None, "empty: the cluster's default; --address is stronger")
    minutes: int = setting(24 * 60, "time limit of one job; a run that needs more goes on in the next", ge=1)
    cpus: int = setting(4, "CPU cores", ge=1)
    requeues: int = setting(20, "how often a run goes on in another job", ge=0)
    parameters: dict[str, Any] = setting(
        {}, "more for sbatch, by submitit's names: {mem: 32G, account: me, setup: [...]}"
    )


class Sweep(Section):
    """A whole sweep."""

    name: Annotated[str, BeforeValidator(check_sweep_name)] = Field(
        description="the sweep's folder below runs/sweeps, and how its runs' names begin"
    )
    notebook: str = Field(description="one with a cell tagged `parameters`", min_length=1)
    recipe: Annotated[
        Names, BeforeValidator(lambda value: (value,) if isinstance(value, str) else () if value is None else value)
    ] = setting((), "the recipe of all runs; several in a list, the later on top; empty: the notebook's own")
    settings: Settings = setting({}, "settings of all runs on top of the recipe")
    grid: Choices | None = setting(None, "every combination: {setting: [values]}; `recipe` may be one of them")
    list: tuple[Settings, ...] | None = setting(None, "the points one by one: [{setting: value}]", strict=False)
    random: Drawn | None = setting(None, "points drawn at random: {runs: 20, seed: 1, space: {setting: range}}")
    search: Search | None = setting(None, "points drawn by Optuna; needs forgekit[search]")
    objective: Objective = setting(Objective(), "by what the runs are compared: {score: ..., direction: ...}")
    gpus: int | None = setting(
        None, "GPUs set aside for one run; empty: train.gpus of them, or none where model.device is cpu", ge=0, le=64
    )
    retries: int = setting(1, "how often a run that failed or crashed goes on from its last checkpoint", ge=0, le=100)
    ray: RayRuns = setting(RayRuns(), "what a run gets under --backend ray: {cpus: 4}")
    slurm: SlurmRuns = setting(
        SlurmRuns(), "what a run gets under --backend slurm: {partition: gpu, minutes: 600, ...}"
    )
    timeout: Time | None = setting(None, "time limit of one run, for instance 2h")
    grace: Time | None = setting(None, "longest time from being asked to stop to the end of a run")

    def names(self) -> tuple[str, ...]:
        """The settings that differ from point to point, in the file's order."""
        if self.grid is not None:
            return tuple(self.grid)
        if self.list is not None:
            return tuple(dict.fromkeys(name for point in self.list for name in point))
        drawn = self.random or self.search
        return tuple(drawn.space) if drawn else ()


INNER: dict[str, type[Section]] = {
    "random": Drawn,
    "search": Search,
    "objective": Objective,
    "prune": Prune,
    "ray": RayRuns,
    "slurm": SlurmRuns,
}


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep's file; the settings of its points are checked with the recipe, by `check_points`.

    Raises ConfigError with one sentence for every problem.
    """
    values = read_recipe(path)
    # in the whole of it: a token in a value must not reach a command line
    problems = [*describe_planted(spread(values), path.name).values()]
    try:
        sweep = Sweep.model_validate(values)
    except ConfigError as error:  # one setting twice, found while flattening
        raise ConfigError([*problems, *error.problems]) from None
    except ValidationError as error:
        raise ConfigError(sorted({*problems, *(explain(found, path.name) for found in error.errors())})) from None
    problems += find_problems(sweep, path.name)
    if problems:
        raise ConfigError(problems)
    return sweep


def spread(value: Any, name: str = "") -> dict[str, Any]:
    """Return every value at the end of a nested file by its place: {"grid.adapter.r.0": 8, ...}."""
    if isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        return {place: end for key, item in items for place, end in spread(item, f"{name}.{key}" if name else str(key)).items()}  # fmt: skip
    return {name: value}


def find_problems(sweep: Sweep, source: str) -> list[str]:
    """Return a sentence for everything that the fields alone do not show."""
    problems = []
    ways = [way for way in WAYS if getattr(sweep, way) is not None]
    if len(ways) != 1:
        found = f"has {' and '.join(ways)}" if ways else "has none of grid, list, random and search"
        problems.append(f"{source} {found}: say in one of the four ways how its points differ.")
    for name in (*sweep.settings, *sweep.names()):
        if name not in NAMES and name != RECIPE:
            problems.append(f"{name}: no such setting (from {source}).{suggest(name, NAMES)}")
    if RECIPE in sweep.settings:
        problems.append(f"settings.recipe (from {source}): a recipe is no setting. Write `recipe:` beside `settings:`.")
    for name in sorted(sweep.settings.keys() & set(sweep.names())):
        problems.append(f"{name} stands under settings and under {ways[0]} of {source}. Keep one of the two.")
    if sweep.grid == {} or sweep.list == ():
        problems.append(f"{source}: {ways[0]} is empty, so there is nothing to run.")
    return problems


def explain(problem: Any, source: str) -> str:
    """Turn one of pydantic's findings into a sentence with the place, the value and the help."""
    # pydantic adds words of its own to the places inside of a union
    place = [part for part in problem["loc"] if part not in ("function-before", "tuple", "dict")]
    fields, field = Sweep.model_fields, None
    for depth, part in enumerate(place):
        if part not in fields:
            if depth == len(place) - 1 and problem["type"] == "extra_forbidden":
                inside = ".".join(map(str, place[:-1]))
                where = f"{inside}.{part}" if inside else str(part)
                known = f" There are: {', '.join(fields)}." if inside else ""
                return f"{where}: a sweep has no such setting (from {source}).{suggest(str(part), list(fields))}{known}"
            break
        field = fields[part]
        inner = INNER.get(str(part))
        fields = inner.model_fields if inner else {}
    name = ".".join(map(str, place))
    meaning = f" Meaning: {field.description}." if field is not None else ""
    if problem["type"] == "missing":
        return f"{name} is missing in {source}.{meaning}"
    text = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    value = json.dumps(problem["input"], default=str)
    return f"{name} is {value} (from {source}): it should be {PLAIN_WORDS.get(text, text)}.{meaning}"
