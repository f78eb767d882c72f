"""A sweep whose points have been checked: what each run would be started with, before anything is started."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Config, flatten, load_config
from ..errors import ConfigError
from ..evaluate.metrics import find_metric, name_metrics
from ..files import finite, read_json
from ..paths import check_inside
from ..recipe import find_recipes
from ..run_folder import DONE, SWEEPS, find_run_root
from ..runs.parameters import find_here, find_parameters
from ..scrub import scrub
from .file import RECIPE, Sweep, read_sweep
from .job import Job
from .points import Point, list_points
from .watch import HELD_OUT_LOSS

# they say how a run goes on, not what it is
NO_DIFFERENCE = ("train.resume", "train.allow_drift", "train.status_file")


@dataclass
class Plan:
    """A checked sweep: `points` are all of it, or none yet where a search draws them."""

    sweep: Sweep
    file: Path
    notebook: Path
    root: Path
    points: list[Point]
    score: str
    maximize: bool
    own: dict[str, tuple[str, Config]] = field(
        default_factory=dict, repr=False
    )  # recipe -> paths, Config without a point

    @property
    def folder(self) -> Path:
        """The sweep's own folder; it holds no run.json, so nobody takes it for a run."""
        return check_inside(self.root, f"{SWEEPS}/{self.sweep.name}")

    def describe(self) -> dict[str, Any]:
        """Return what sweep.json holds beside the runs."""
        return {
            "name": self.sweep.name,
            "file": self.file.name,
            "notebook": self.notebook.name,
            "score": self.score,
            "direction": "maximize" if self.maximize else "minimize",
            "settings": list(self.sweep.names()),
            "definition": self.sweep.model_dump(exclude_none=True),
        }

    def load(self, point: Mapping[str, Any]) -> tuple[str, Config]:
        """Return the recipes and the Config that a point's run gets, as `forgekit run` would. Raises ConfigError."""
        recipe = str(point.get(RECIPE) or " + ".join(self.sweep.recipe))
        if recipe not in self.own:
            self.own[recipe] = load_base(self.notebook, recipe, self.file.parent)
        recipes, config = self.own[recipe]
        settings = self.sweep.settings | {name: value for name, value in point.items() if name != RECIPE}
        return recipes, config.change(find_here(settings), self.file.name)

    def count_gpus(self) -> int:
        """Return how many GPUs each run takes where there are any; of a search the most that a corner of it takes."""
        if self.sweep.gpus is not None:
            return self.sweep.gpus
        settings = [point.settings for point in self.points] or list_corners(self.sweep)
        configs = [self.load(point)[1] for point in settings]
        if all(config.model.device == "cpu" for config in configs):
            return 0
        return max(config.train.gpus for config in configs)

    def find_last_step(self, point: Point) -> int | None:
        """Return the step at which a point's training ends, or None where the rows decide that."""
        steps = self.load(point.settings)[1].train.max_steps
        return steps if steps and steps > 0 else None

    def make_job(self, point: Point, has_gpu: bool) -> Job:
        """Return what a backend starts for a point; `has_gpu` says whether its machines have any."""
        recipes, config = self.load(point.settings)
        gpus = self.sweep.gpus
        if gpus is None:
            gpus = config.train.gpus if has_gpu and config.model.device != "cpu" else 0
        arguments = ["run", str(self.notebook), "--name", point.name]
        arguments += [word for recipe in filter(None, recipes.split(" + ")) for word in ("--recipe", recipe)]
        settings = self.sweep.settings | {name: value for name, value in point.settings.items() if name != RECIPE}
        arguments += [f"--set={name}={json.dumps(value)}" for name, value in settings.items()]
        if config.train.resume == "never":  # it would refuse its own folder, and a run that stopped has to go on
            arguments += ["--resume", "auto"]
        arguments += [word for name in ("timeout", "grace") if getattr(self.sweep, name) for word in (f"--{name}", getattr(self.sweep, name))]  # fmt: skip
        environment = {"FORGEKIT_RUNS": str(self.root)}
        return Job(point.name, self.root, tuple(arguments), Path.cwd(), environment, gpus, self.find_log(point))

    def find_log(self, point: Point) -> Path:
        """Return the file of what a point's run prints."""
        return self.folder / "logs" / f"{point.name}.log"

    def check_same(self, point: Point) -> list[str]:
        """Return what differs between a completed run of that name and the point as it is now: "train.seed: 1, now 2"."""
        record = read_json(self.root / point.name / "run.json")
        made = {name: entry.get("value") for name, entry in record.get("settings", {}).items()}
        now = list_settings(self.load(point.settings)[1])
        return [
            f"{name}: {made[name]!r}, now {now[name]!r}" for name in now if name in made and made[name] != now[name]
        ]


def plan_sweep(path: Path) -> Plan:
    """Read a sweep and check every point of it with its recipe; nothing is written or started.

    Raises ConfigError with all problems at once.
    """
    if not path.is_file():
        raise ConfigError(
            f"sweep {path} does not exist. `forgekit init DIR` copies the shipped ones to DIR/params/sweeps."
        )
    path = path.absolute()
    sweep = read_sweep(path)
    notebook = find_notebook(sweep.notebook, path.parent)
    plan = Plan(sweep, path, notebook, Path(), list_points(sweep), "", True)
    configs = check_points(plan)
    plan.root = find_run_root(configs[0].recipe)
    plan.score, plan.maximize = find_objective(sweep, configs)
    refuse_changed(plan)
    return plan


def find_notebook(name: str, folder: Path) -> Path:
    """Return the notebook's path: from the sweep's folder or one of the two above it, or from the current one."""
    given = Path(name).expanduser()
    places = [place / given for place in (folder, *list(folder.parents)[:2], Path.cwd())]
    for place in places:
        if place.is_file():
            return place.resolve()
    raise ConfigError(f"notebook {name!r}: no such file in {folder}, the two folders above it, or {Path.cwd()}.")


def load_base(notebook: Path, recipe: str, folder: Path) -> tuple[str, Config]:
    """Return recipes as paths joined by " + ", and the Config of the notebook with them."""
    parameters = find_parameters(notebook)
    found = find_recipes(recipe, folder) if recipe else []
    if not recipe and parameters["recipe"]:
        found = find_recipes(parameters["recipe"], notebook.parent)
    recipes = " + ".join(map(str, found))
    return recipes, load_config(recipes or None, parameters["settings"], origin="notebook")


def check_points(plan: Plan) -> list[Config]:
    """Return each point's Config. Raises ConfigError naming every problem once, with the first run that has it.

    Of a search the lowest and the highest corner of its space are checked, and each choice.
    """
    points = plan.points or [Point(plan.sweep.name, settings) for settings in list_corners(plan.sweep)]
    problems: dict[str, list[str]] = {}
    configs = []
    for point in points:
        try:
            configs.append(plan.load(point.settings)[1])
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(point.name)
    if problems:
        raise ConfigError([add_names(problem, names, len(points)) for problem, names in problems.items()])
    return configs


def add_names(problem: str, names: list[str], total: int) -> str:
    """Add which runs have a problem, where not all of them have it."""
    if len(names) == total:
        return problem
    return f"{problem} (run {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})"


def list_corners(sweep: Sweep) -> list[dict[str, Any]]:
    """Return points of a search that stand for all: every bound and every choice appears in one of them."""
    assert sweep.search is not None
    marks = {name: place.list_marks() for name, place in sweep.search.space.items()}
    most = max(map(len, marks.values()))
    return [{name: values[i % len(values)] for name, values in marks.items()} for i in range(most)]


def find_objective(sweep: Sweep, configs: list[Config]) -> tuple[str, bool]:
    """Return the score that the runs are compared by, and whether more of it is better.

    Raises ConfigError when some run would not have it.
    """
    score = sweep.objective.score or configs[0].evaluate.metric[0]
    prune = sweep.search and sweep.search.prune
    problems = []
    needed = {score, prune.by} if prune else {score}
    if HELD_OUT_LOSS in needed and not all(config.train.eval_steps for config in configs):
        problems.append(
            f"{HELD_OUT_LOSS} is measured during training: set train.eval_steps and data.validation for all runs."
        )
    lacking = [] if score == HELD_OUT_LOSS else [config for config in configs if score not in name_metrics(config)]
    if lacking:
        known = ", ".join([*name_metrics(lacking[0]), HELD_OUT_LOSS])
        problems.append(f"objective.score is {score!r}, and not every run has it. There are: {known}.")
    if problems:
        raise ConfigError(problems)
    higher = score != HELD_OUT_LOSS and find_metric(score).higher
    return score, sweep.objective.direction == "maximize" if sweep.objective.direction else higher


def refuse_changed(plan: Plan) -> None:
    """Raise ConfigError when a completed run of this sweep was made with other settings: its name would promise these."""
    problems = []
    for point in plan.points:
        if read_state(plan.root / point.name) == DONE:
            differences = plan.check_same(point)
            if differences:
                problems.append(
                    f"run {point.name} is completed, with other settings: {'; '.join(differences)}. "
                    "Give the sweep another name, or move that run away."
                )
    if problems:
        raise ConfigError(problems)


def list_settings(config: Config) -> dict[str, Any]:
    """Return all settings by dotted name as they stand in a run.json."""
    values = {name: value for name, value in flatten(config.model_dump()).items() if name not in NO_DIFFERENCE}
    return json.loads(scrub(json.dumps(finite(values), ensure_ascii=False, default=str)))


def read_state(folder: Path) -> str | None:
    """Return the state that a run's run.json tells, or None where there is none."""
    return read_json(folder / "run.json").get("state") if (folder / "run.json").is_file() else None
