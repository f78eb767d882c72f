"""What a job's form says, as `forgekit run` takes it: values are read as YAML, never as code.

recipe              params/text.yaml        a file, looked for beside the notebook, then in the server's folder
run_name            first                   the run's name; a run of that name that did not complete goes on
train.max_steps     60                      any setting, also written settings.train.max_steps
settings            {adapter.r: 32}         several at once
"""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import NAMES, Config, load_config, read_settings
from ..conflicts import suggest
from ..errors import ConfigError
from ..recipe import find_recipes, parse_yaml
from ..run_folder import check_name
from ..runs.parameters import find_parameters
from ..tokens import refuse_tokens

KNOWN = ("recipe", "run_name", "settings")


@dataclass(frozen=True)
class Given:
    """A job's parameters: files of the recipes, values of settings by dotted name, and a run's name or None."""

    recipes: tuple[Path, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    run_name: str | None = None


def read_parameters(parameters: Mapping[str, str], *folders: Path) -> Given:
    """Return a job's parameters; a recipe is looked for in each of the folders.

    Raises ConfigError when a name is unknown, a value no YAML, a recipe missing, or something a token.
    """
    refuse_tokens(parameters, "the job's parameters")
    values = {name.strip(): text.strip() for name, text in parameters.items()}
    problems, settings = [], read_settings(values.get("settings"))
    for name, text in values.items():
        dotted = name.removeprefix("settings.")
        if name in KNOWN:
            continue
        if dotted not in NAMES:
            names = [*KNOWN, *NAMES]
            problems.append(f"{name or '(no name)'}: no such parameter or setting.{suggest(dotted, names)}")
        elif dotted in settings:
            problems.append(f"{dotted} stands twice in the job's parameters. Keep one of the two.")
        else:
            settings[dotted] = parse_yaml(text, name)
    if problems:
        raise ConfigError(problems)
    recipe, run = values.get("recipe"), values.get("run_name")
    return Given(tuple(find_beside(recipe, folders)) if recipe else (), settings, check_name(run) if run else None)


def find_beside(recipe: str, folders: tuple[Path, ...]) -> list[Path]:
    """Return the files of a recipe from the first folder that leads to them; raises ConfigError about the first otherwise."""
    for folder in folders:
        with contextlib.suppress(ConfigError):
            return find_recipes(recipe, folder)
    return find_recipes(recipe, folders[0])


def check_job(notebook: Path, folder: Path, given: Given) -> Config:
    """Return the settings that a run would have, all of them checked.

    Args:
        notebook: the job's copy.
        folder: where the original stands, and where the run takes place.

    Raises ConfigError with every problem.
    """
    own = find_parameters(notebook)
    recipes = given.recipes or (find_recipes(own["recipe"], folder) if own["recipe"] else ())
    config = load_config(" + ".join(map(str, recipes)) or None, own["settings"], origin="notebook")
    return config.change(given.settings, "the job")


def name_run(job: str, id: str) -> str:
    """Return a run's name for a job that gives none: the job's own name and the beginning of its number."""
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(job).stem).strip("-._")[:80]
    return f"{words or 'job'}-{id[:8]}"
